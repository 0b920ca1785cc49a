"""The layers of the library: what its modules may import from each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPLEMENTATIONS = ("lsg_attn.blockwise", "lsg_attn.fused", "lsg_attn.reference")


def name_of(path):
    """The name of the module at a path, or of the package for its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "lsg_attn").rglob("*.py")}


def imports(name, is_nested):
    """The modules of the library that a module imports at its top level, or ``is_nested``, anywhere in it."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree) if is_nested else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return found & MODULES.keys() - {name}


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(name, is_nested=False) for name in MODULES}
    assert graph["lsg_attn.dispatch"] > {"lsg_attn.operator", "lsg_attn.reference"}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_do_not_import_each_other(implementation):
    others = [other for other in IMPLEMENTATIONS if other != implementation]
    modules = [name for name in MODULES if name.startswith(implementation)]
    assert modules
    found = {(name, target) for name in modules for target in imports(name, is_nested=True)}
    assert [pair for pair in found if pair[1].startswith(tuple(others))] == []
