"""The package as it is installed: imports, requirements, the kernels/ trap, wheel, sdist and index page."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

import lsg_attn

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.relative_to(ROOT) for top in ("lsg_attn", "kernels") for path in (ROOT / top).rglob("*.py"))


def run(code, cwd, **options):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_triton_nor_transformers(tmp_path):
    code = (
        "import sys, lsg_attn; print([m for m in ('triton', 'transformers', 'rich', 'matplotlib') if m in sys.modules])"
    )
    # torch itself may import triton where it is there: compare with torch alone
    alone = run(code.replace("lsg_attn", "torch"), tmp_path)
    assert run(code, tmp_path) == alone


def test_without_triton_and_c_auto_is_torch():
    """Without triton and C++ the library imports, "auto" chooses "torch", and "triton" says what is missing."""
    code = """
import sys
sys.modules["triton"] = None  # from here on `import triton` fails, and find_spec("triton") finds nothing
from importlib.util import find_spec
assert find_spec("triton") is None
import torch
import lsg_attn, lsg_attn.cli.main
from lsg_attn.testing import make_inputs, run_attention
pattern = lsg_attn.LSGPattern(8, 8, 2, num_global_tokens=1)
inputs = make_inputs(1, 2, 60, 8, padding="right")
auto, torch_ = (run_attention(inputs, pattern, implementation=name) for name in ("auto", "torch"))
assert auto.keys() == torch_.keys() == {"out", "dquery", "dkey", "dvalue"}
print(*(torch.equal(auto[name], torch_[name]) for name in auto))
try:
    run_attention(inputs, pattern, implementation="triton")
except ValueError as error:
    print(error)
"""
    equal, error = run(code, ROOT, env={**os.environ, "LSG_ATTN_CPP": "0"}).splitlines()
    assert equal == "True True True True"
    assert "triton is not installed" in error


def test_kernels_folder_does_not_pose_as_hugging_faces_package():
    """With the root of the checkout on sys.path, as in `python -m pytest`."""
    assert not (ROOT / "kernels/__init__.py").exists()
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import BartConfig, BartModel\n"
        "import lsg_attn.kernels\n"
        "print(is_kernels_available(), *lsg_attn.kernels.__path__)"
    )
    available, path = run(code, ROOT).split(" ", 1)
    assert available == "False"
    assert Path(path) == ROOT / "kernels"


def test_version_and_date_are_those_of_the_changelog():
    """Its newest heading is that of the version, in the form of Keep a Changelog."""
    headings = re.findall(r"^## .*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    version, date = re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", headings[0]).groups()
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert lsg_attn.__version__ == version
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with an sdist and a wheel made from it, as pip makes it for users of an index."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The folder where the wheel is unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(installed):
    (file,) = installed.glob("*.dist-info/METADATA")
    return BytesParser().parsebytes(file.read_bytes())


def test_wheel_works_where_the_checkout_is_not(installed):
    assert (installed / "lsg_attn/py.typed").exists()
    assert (installed / "lsg_attn/models/bart.py").exists()
    for folder in ("lsg_attn/blockwise/cpp", "lsg_attn/cli/pages"):
        assert len(list((installed / folder).iterdir())) == len(list((ROOT / folder).iterdir()))
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import torch, lsg_attn, lsg_attn.kernels, lsg_attn.fused.forward\n"
        "x = torch.randn(1, 700, 8)\n"
        "print(lsg_attn.__file__, *lsg_attn.kernels.__path__, tuple(lsg_attn.LSGAttention(8, 2)(x).shape), sep='|')"
    )
    file, path, shape = run(code, installed).split("|")
    assert Path(file) == installed / "lsg_attn/__init__.py"
    assert Path(path) == installed / "lsg_attn/kernels"
    assert (Path(path) / "README.md").exists()
    assert shape == "(1, 700, 8)"


def test_every_module_of_the_checkout_imports_from_the_wheel(installed):
    files = [path if path.parts[0] == "lsg_attn" else "lsg_attn" / path for path in SOURCES]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        f"for name in {names!r}: print(importlib.import_module(name).__file__)"
    )
    assert run(code, installed).splitlines() == [str(installed / path) for path in files]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists what the sdist must hold")
def test_sdist_holds_the_checkout(dist):
    """What git tracks, except hidden files: the tests, with the examples they run, can be run from it."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {name for name in tracked.stdout.split("\0") if name and not name.startswith(".")}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert {"Makefile", "constraints.txt", "examples/summarize.py", "docs/pattern.png"} <= expected
    assert not {name for name in expected if (ROOT / name).exists()} - held


def third_party(path):
    """What the module imports when it is imported; not what its functions import."""
    nodes = [
        node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lsg_attn"}


def test_requirements_are_what_modules_import(metadata):
    """The base requirements are what the library imports; extras add what lsg_attn.models and the kernels import."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]

    def required(extra):
        environment = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": extra}
        return {x.name for x in requirements if x.marker is None or x.marker.evaluate(environment)}

    imported = {"": set(), "models": set(), "triton": set()}
    for path in SOURCES:
        has_models = "models" in path.parts or path.name in ("demo_model.py", "demo_encoder.py")
        extra = "models" if has_models else "triton" if {"fused", "kernels"} & set(path.parts) else ""
        imported[extra] |= third_party(path)
    assert required("") == imported[""]
    assert required("bart") == required("models") == imported[""] | imported["models"]
    assert required("triton") == imported[""] | imported["triton"]


def test_index_page_has_no_relative_image_or_link(metadata):
    """An index shows the README without the repository around it. Nothing else of the README changes."""
    page, readme = (
        MarkdownIt("commonmark").enable("table").parse(text)
        for text in (metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8"))
    )

    def find(tokens, *types):
        return [x for token in tokens for x in (token, *(token.children or ())) if x.type in types]

    targets = [x.attrs.get("href", x.attrs.get("src")) for x in find(page, "link_open", "image")]
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "http://"))] == []
    assert not [x.content for x in find(page, "html_block", "html_inline") if re.search(r"\b(src|href)=", x.content)]
    code = [x.content for x in find(page, "fence")]
    assert code == [x.content for x in find(readme, "fence")]
    headings = [[token.map for token in find(tokens, "heading_open")] for tokens in (page, readme)]
    assert headings[0] == headings[1]


def test_readme_quick_start_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "LSGAttention" in block)  # tests/bart runs the others
    code += "print(tuple(out.shape), layer.q_proj.weight.grad.abs().sum().item() > 0)"
    assert run(code, tmp_path) == "(2, 4001, 768) True"
