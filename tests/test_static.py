"""bench.static: it compiles what dispatch chooses, and fails where a kernel may not ship."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench.static import compile as static
from bench.static.binary import GPUS
from bench.static.compile import Case, Row, cases, compile_and_read, compile_row, faults, key_of

RESULTS = Path(__file__).parents[1] / "bench/results/static.json"
GOOD = Row("_lsg_fwd_kernel", "none bfloat16 d64", "sm_86", 255, 0, 64, 99 * 1024, 16, 8, 0, 1, 0.1, 4, 2, "3.8.0", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "_CACHE", tmp_path)


def names(subset, targets):
    return {
        (launch.kernel.__name__, name, case.target)
        for case in cases(subset, targets)
        for name, launch in case.launches()
    }


def test_subsets():
    """Each has every kernel; "all" has each type family, dtype, head_dim 64 and 128, masks and dropout."""
    quick, ci, everything = (names(subset, ["sm_90"]) for subset in ("quick", "ci", "all"))
    assert quick < ci < everything
    assert len({kernel for kernel, _, _ in quick}) == 10
    families, dtypes = ("none", "stride", "block_stride", "indexed", "compressed"), ("bfloat16", "float16", "float32")
    expected = {
        " ".join(filter(None, (family, dtype, f"d{head_dim}", mask, dropout)))
        for family in families
        for dtype in dtypes
        for head_dim in (64, 128)
        for mask in ("", "mask")
        for dropout in ("", "dropout")
    }
    expected |= {f"indexed float32 {sizes}" for sizes in ("d64 mask B32", "d128 mask G200", "d256 mask")}
    assert {variant for kernel, variant, _ in everything if kernel == "_lsg_fwd_kernel"} >= expected
    # of the backward, dropout and both head_dims in bfloat16, and the other dtypes and sizes without
    expected = {
        f"{family} bfloat16 d{head_dim} mask{dropout}"
        for family in families
        for head_dim in (64, 128)
        for dropout in ("", " dropout")
    }
    expected |= {f"{family} {dtype} d64 mask" for family in families for dtype in dtypes}
    expected |= {f"{family} bfloat16 d64" for family in families}
    expected |= {f"indexed float32 {sizes}" for sizes in ("d64 mask B32", "d128 mask G200", "d256 mask")}
    assert {variant for kernel, variant, _ in everything if kernel == "_lsg_bwd_dq_dkv_kernel"} >= expected


@pytest.mark.usefixtures("cache")
def test_a_row_is_compiled_once(monkeypatch):
    case = Case("none", torch.bfloat16, 64, False, False, "sm_90")
    combine = [launch.kernel.__name__ for _, launch in case.launches()].index("_lsg_fwd_combine_kernel")
    row = compile_row(case, combine)
    assert row.registers > 0
    assert row.spill_bytes == row.tensor_core_instructions == 0
    assert 0 < row.occupancy <= 1
    monkeypatch.setattr(static.triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    assert compile_row(case, combine) == row


@pytest.mark.usefixtures("cache")
def test_the_attention_kernel_uses_tensor_cores_and_async_copies():
    row = compile_row(Case("none", torch.float16, 64, False, False, "sm_80"), 0)
    assert row.tensor_core_instructions > 100
    assert row.async_copies > 0
    assert faults(row) == []


@triton.jit
def _adds(x_ptr, values: tl.constexpr):
    """One program: add to memory without an order."""
    offs = tl.arange(0, values)
    tl.atomic_add(x_ptr, tl.sum(tl.load(x_ptr + offs), 0))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_atomics_are_counted(target):
    """In a kernel that has them; where the committed rows have none, that is not for want of looking."""
    source = ASTSource(_adds, {"x_ptr": "*fp32", "values": "constexpr"}, {(1,): 64})
    assert compile_and_read(source, target, {})["float_atomics"] > 0


@pytest.mark.usefixtures("cache")
def test_what_does_not_compile_is_a_result(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(static.triton, "compile", fail)
    error = compile_row(Case("norm", torch.float16, 64, True, False, "sm_90"), 0)
    assert error == "_lsg_norm_kernel norm float16 d64 mask sm_90: RuntimeError: no registers left"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spill_bytes": 65}, "spills 65 bytes, more than 64"),
        ({"shared_bytes": 99 * 1024 + 1}, "takes 101377 bytes of shared memory of 101376"),
        ({"tensor_core_instructions": 0}, "has no tensor-core instruction"),
        ({"float_atomics": 1}, "has 1 atomics on floats, and no sum's order may depend on timing"),
    ],
)
def test_faults(change, what):
    assert faults(GOOD) == []
    assert faults(replace(GOOD, **change)) == [f"_lsg_fwd_kernel none bfloat16 d64 sm_86 {what}"]


@pytest.mark.parametrize(("row", "status"), [(GOOD, 0), (replace(GOOD, spill_bytes=999), 1)])
def test_status(row, status, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "compile_all", lambda todo, jobs: ([row], []))
    assert static.main(["--json", str(tmp_path / "rows.json")]) == status
    assert json.loads((tmp_path / "rows.json").read_text())[0]["spill_bytes"] == row.spill_bytes
    monkeypatch.setattr(static, "compile_all", lambda todo, jobs: ([row], ["one did not compile"]))
    assert static.main([]) == 1


def test_committed_rows_are_of_these_kernels_and_without_faults():
    rows = [Row(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))]
    assert [fault for row in rows for fault in faults(row)] == []
    # a kernel that several cases take is one row, by the name that the first gives it
    everything = names("all", GPUS)
    assert {(row.kernel, row.variant, row.target) for row in rows} <= everything
    assert {(row.kernel, row.target) for row in rows} == {(kernel, gpu) for kernel, _, gpu in everything}
    if {row.triton for row in rows} == {triton.__version__}:
        sources = {key_of(case, launch) for case in cases("all", list(GPUS)) for _, launch in case.launches()}
        assert {row.source for row in rows} == sources, "the kernels have changed: run make static"
