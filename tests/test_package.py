"""The package as it is installed: imports, the kernels/ trap, wheel and sdist."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made from the sdist, as pip makes it for users of an index."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_works_where_the_checkout_is_not(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "lsg_attn/py.typed").exists()
    assert (tmp_path / "lsg_attn/bart/modeling.py").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, lsg_attn, lsg_attn.kernels, lsg_attn.fused.forward\n"
        "x = torch.randn(1, 700, 8)\n"
        "print(lsg_attn.__file__, *lsg_attn.kernels.__path__, tuple(lsg_attn.LSGAttention(8, 2)(x).shape), sep='|')"
    )
    file, path, shape = run(code, tmp_path).split("|")
    assert Path(file) == tmp_path / "lsg_attn/__init__.py"
    assert Path(path) == tmp_path / "lsg_attn/kernels"
    assert (Path(path) / "README.md").exists()
    assert shape == "(1, 700, 8)"


def test_readme_quick_start_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "LSGAttention" in block)  # tests/bart runs the others
    code += "print(tuple(out.shape), layer.q_proj.weight.grad.abs().sum().item() > 0)"
    assert run(code, tmp_path) == "(2, 4001, 768) True"
