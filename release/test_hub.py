"""The folder that make_hub.py builds, as Hugging Face's kernels loads it: ``make hub`` builds it and runs these tests.

That package is on PYTHONPATH, which the processes started here inherit. They run where no checkout is.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import make_hub
import pytest
from kernels import Metadata
from kernels._rust import Build, Digest, DigestAlgorithm

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build/hub"
VARIANTS = sorted(path for path in (FOLDER / "build").iterdir() if path.is_dir())
# Where an installed library cannot be imported: a function that runs the folder's own tests, or those of them chosen.
ALONE = f"""
import os, sys, pytest
sys.modules["lsg_attn"] = None
folder = {str(FOLDER)!r}
def test(*options):
    common = ["-q", "-W", "error", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", folder]
    return pytest.main([*common, *options, folder])
"""


def run(code, folder, *arguments):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", ["import rich.table", "from lsg_attn.pattern import LSGPattern", "import os, numpy"])
def test_other_imports_are_refused(tmp_path, line):
    """In a function, too; what only type checkers read may be imported from anywhere."""
    path = tmp_path / "call.py"
    fine = "import os, torch\nif TYPE_CHECKING:\n    import rich\nfrom . import pattern\nfrom .fused.forward import f\n"
    path.write_text(fine)
    found = set(make_hub.imports("call.py", path, {"", "pattern", "fused", "fused.forward"}))
    assert found == {"", "pattern", "fused", "fused.forward"}
    path.write_text(f"{fine}def f():\n    {line}\n")
    with pytest.raises(ValueError, match=r"call\.py:7: expected a relative import or one of the standard library, ein"):
        list(make_hub.imports("call.py", path, {""}))


def test_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="expected nothing, or an older folder of this kind"):
        make_hub.make_hub(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_the_builder_can_read_it():
    """Its configuration, whose backends are those that were built."""
    names = {str(backend).rpartition(".")[2].lower() for backend in Build.open(FOLDER).general.backends}
    assert {f"torch-{name}" for name in names} == {variant.name for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.name)
def test_metadata(variant):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    backend = variant.name.removeprefix("torch-")
    assert re.fullmatch(rf"_lsg_attn_{backend}_[0-9a-f]{{10}}", metadata.id)
    assert metadata.name.python_name == "lsg_attn"
    assert metadata.python_depends == ["einops"]
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))  # raises DigestValidationError
    held = files(variant)
    del held[Path("metadata.json")]
    assert held == files(FOLDER / "torch-ext/lsg_attn")


def test_its_own_tests_pass_without_the_library(tmp_path):
    out = run(f"{ALONE}sys.exit(test())", tmp_path)
    assert re.search(r"^(\d+) passed in", out, re.MULTILINE), out


def test_its_kernels_launch(tmp_path):
    """Executed by ttsem, which stands in for a GPU."""
    code = f"""{ALONE}
from ttsem import sanitize
with sanitize.session() as session:
    status = test("-k", "test_attention and float32 and norm")
print(session.launches)
sys.exit(status)
"""
    *lines, launches = run(code, tmp_path).splitlines()
    assert lines[-1].startswith("1 passed")
    assert int(launches) > 2


def test_beside_the_installed_library_and_another_version(tmp_path):
    """Each has its own operator, so that a call runs the code of the package that was called."""
    other = tmp_path / "other"
    shutil.copytree(FOLDER / "build", other / "build")
    for metadata in other.glob("build/*/metadata.json"):
        metadata.write_text(re.sub(r'("id": "\w+)"', r'\1other"', metadata.read_text()))
    code = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
import lsg_attn
packages = [lsg_attn, *(get_local_kernel(Path(folder)) for folder in sys.argv[1:])]
ran = []

def recorded(package, function):
    def record(*arguments):
        ran.append(package)
        return function(*arguments)
    return record

for package in packages:
    module = sys.modules[package.__name__ + ".operator"]
    for name in ("blockwise_forward", "blockwise_backward"):
        setattr(module, name, recorded(package, getattr(module, name)))
inputs = torch.randn(3, 1, 2, 70, 16, requires_grad=True)
results = []
for package in packages:
    pattern = package.LSGPattern(8, 8, 2)
    out = torch.compile(lambda *x: package.lsg_attention(*x, pattern), backend="aot_eager")(*inputs)
    results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert ran == [package] * 2, (package, ran)
    ran.clear()
assert all(torch.equal(x, y) for other in results for x, y in zip(results[0], other))
print(len({package.__name__ for package in packages}))
"""
    assert run(code, tmp_path, str(FOLDER), str(other)) == "3\n"


def test_its_benchmark_runs(tmp_path):
    out = tmp_path / "results.json"
    options = ["--iterations", "1", "--warmup", "0", "--output", str(out)]
    run("from kernels.cli import main; main()", tmp_path, "benchmark", str(FOLDER), *options)
    results = {entry["workload"]: entry for entry in json.loads(out.read_text())["results"]}
    assert len(results) == 5
    assert results["LSGAttention.local_forward"]["verified"]


def test_the_example_of_its_card_runs(tmp_path, monkeypatch):
    """Loaded by the name that it has on the hub, from this folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / "CARD.md").read_text(), re.DOTALL)
    monkeypatch.setenv("LOCAL_KERNELS", f"<owner>/lsg-attn={FOLDER}")
    assert run(f"{code}\nprint(*out.shape, *hidden.shape)", tmp_path) == "1 12 8193 64 1 8192 768\n"
