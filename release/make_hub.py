"""Builds from the sources the folder that Hugging Face's kernels loads: ``python release/make_hub.py build/hub``.

It has the layout of a project of ``kernel-builder`` (edition 5, ``torch-noarch``), and in ``build/`` what that tool
makes of one. The files of the package are copied as they are.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from string import Template

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "hub"
NAME = "lsg-attn"
PACKAGE = "lsg_attn"
BACKENDS = ("cpu", "cuda", "rocm")
DEPENDS = ("einops",)  # of what kernels knows as dependencies
ALLOWED = sys.stdlib_module_names | {"torch", "triton", *DEPENDS}


def make_hub(folder: Path) -> None:
    """Write the folder, in place of an older one.

    Raises:
        FileExistsError: something else is there.
        ValueError: a module imports what the kernels hub does not allow.
    """
    if folder.exists() and not (folder / "build.toml").exists():
        raise FileExistsError(f"{folder}: expected nothing, or an older folder of this kind, with a build.toml")
    files = package_files()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEMPLATES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy(files, folder / "torch-ext" / PACKAGE)
    version, public = described()
    number = int(version.split(".")[0])  # of the interface; 0 says that it may still change
    fill(folder / "build.toml", name=NAME, number=number, backends=json.dumps(BACKENDS), depends=json.dumps(DEPENDS))
    names = "\n".join(f"- `{name}`" for name in public)
    fill(folder / "CARD.md", version=version, number=number, public=names, verification=verification())
    copy({"CARD.md": folder / "CARD.md"}, folder / "build")  # from where kernel-builder uploads it, as README.md
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        copy(files, variant)
        write_metadata(variant, backend, number, {name: path.read_bytes() for name, path in files.items()})


def copy(files: dict[str, Path], folder: Path) -> None:
    """Copy files to the paths in the folder that they are named by."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def fill(path: Path, **values: object) -> None:
    """Put values in place of the names in a template."""
    path.write_text(Template(path.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")


def write_metadata(variant: Path, backend: str, number: int, files: dict[str, bytes]) -> None:
    """Write what kernels reads first. The id is the name of the package once it is loaded, of these contents alone."""
    digests = {name: hashlib.sha256(data).digest() for name, data in sorted(files.items())}
    unique = hashlib.sha256(b"".join(name.encode() + b"\0" + digest for name, digest in digests.items())).hexdigest()
    metadata = {
        "name": NAME,
        "id": f"_{PACKAGE}_{backend}_{unique[:10]}",
        "version": number,
        "license": "mit",
        "python-depends": DEPENDS,
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def described() -> tuple[str, list[str]]:
    """The package's version and its public names."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"', text, re.MULTILINE)
    (public,) = re.findall(r"^__all__ = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    return version, ast.literal_eval(public)


def verification() -> str:
    """What the documentation says of runs on a GPU, without links: they lead nowhere from a card.

    Raises:
        ValueError: the page has no such section.
    """
    page = ROOT / "docs/verification.md"
    section = re.search(r"^## On a GPU\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"{page}: expected a section '## On a GPU'")
    without_ends = re.sub(r": \[[^\]]+\]\([^)]+\)", "", section[1])  # a sentence that ends with where to read on
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", without_ends).strip()


def package_files() -> dict[str, Path]:
    """The files of the package by their path in it: the modules that the public names need, the C++ and the license."""
    paths = {path.relative_to(ROOT / PACKAGE).as_posix(): path for path in (ROOT / PACKAGE).rglob("*.py")}
    paths |= {f"kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
    names = {path.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", "."): path for path in paths}
    files: dict[str, Path] = {}
    waiting = [""]  # the package itself
    while waiting:
        name = names[waiting.pop()]
        if name not in files:
            files[name] = paths[name]
            waiting += imports(name, paths[name], names.keys())
    files |= {f"blockwise/cpp/{path.name}": path for path in (ROOT / PACKAGE / "blockwise/cpp").iterdir()}
    return files | {"LICENSE": ROOT / "LICENSE"}


def imports(name: str, path: Path, modules: Set[str]) -> Iterator[str]:
    """The modules of the package that a file of it imports, at its top or in a function, and the packages they are in.

    Raises:
        ValueError: it imports something else than these and ``ALLOWED``.
    """
    package = name.split("/")[:-1]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            yield from (".".join(base[:end]) for end in range(len(base) + 1))
            yield from modules & {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            others = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if refused := {other.split(".")[0] for other in others} - ALLOWED:
                allowed = ", ".join(["the standard library", *sorted(ALLOWED - sys.stdlib_module_names)])
                found = ", ".join(sorted(refused))
                raise ValueError(f"{path}:{node.lineno}: expected a relative import or one of {allowed}, got {found}")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a module except what only type checkers read."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from nodes(child)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path, help="where to write it")
    make_hub(parser.parse_args().folder)


if __name__ == "__main__":
    main()
