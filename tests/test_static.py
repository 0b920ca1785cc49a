"""bench.static: it compiles what dispatch chooses, and fails where a kernel may not ship."""

from collections import Counter
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench.static import compile as static
from bench.static.binary import GPUS
from bench.static.calls import Label, PlannedCall, kernels_of, planned_calls
from bench.static.figures import Figures, compile_and_read
from bench.static.rows import Row, faults, read_rows, summarize, to_markdown, write_rows
from bench.static.stage import stage_of
from lsg_attn import SPARSITY_TYPES

RESULTS = Path(__file__).parents[1] / "bench/results/static.csv"
GOOD = Row(
    Label("_lsg_fwd_kernel", "none", "forward", "bfloat16", "64", "128", "1", "no", "no", "sm_86"),
    Figures(255, 0, 64, 99 * 1024, 16, 8, 0),
    num_warps=4,
    num_stages=2,
    triton="3.8.0",
    key="0123456789abcdef",
    stage="fedcba9876543210",
)


def changed(row, **figures):
    return replace(row, figures=replace(row.figures, **figures))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "_CACHE", tmp_path)


@pytest.fixture(scope="module")
def everything():
    """All kernels, by key."""
    return kernels_of(planned_calls("all", list(GPUS)))


@pytest.fixture(scope="module")
def committed():
    return read_rows(RESULTS)


def served(label, *names):
    """The combinations of values that the calls of a label have in these fields."""
    return set(product(*(getattr(label, name).split("/") for name in names)))


def test_subsets():
    """Each has every kernel; "all" has each type, dtype, head_dim 64 and 128, masks and dropout."""
    quick, ci, everything = (
        [kernel.label for kernel in kernels_of(planned_calls(subset, ["sm_90"])).values()]
        for subset in ("quick", "ci", "all")
    )
    assert len({label.kernel for label in quick}) == 10
    names = ("kernel", "types", "passes", "dtype", "head_dim", "block_size", "num_globals", "mask", "dropout")
    quick_calls, ci_calls, all_calls = (
        {call for label in labels for call in served(label, *names)} for labels in (quick, ci, everything)
    )
    assert quick_calls < ci_calls < all_calls
    dtypes, yes_no = ("bfloat16", "float16", "float32"), ("yes", "no")
    expected = set(product(SPARSITY_TYPES, dtypes, ("64", "128"), ("128",), ("1",), yes_no, yes_no))
    other_sizes = {
        ("norm", "float32", *sizes, "yes", "no")
        for sizes in (("64", "32", "1"), ("128", "128", "200"), ("256", "128", "1"))
    }
    assert {call[1:2] + call[3:] for call in all_calls if call[0] == "_lsg_fwd_kernel"} >= expected | other_sizes
    # of the backward, dropout and both head_dims in bfloat16, and the other dtypes and sizes without
    expected = set(product(SPARSITY_TYPES, ("bfloat16",), ("64", "128"), ("128",), ("1",), ("yes",), yes_no))
    expected |= set(product(SPARSITY_TYPES, dtypes, ("64",), ("128",), ("1",), ("yes",), ("no",)))
    expected |= set(product(SPARSITY_TYPES, ("bfloat16",), ("64",), ("128",), ("1",), ("no",), ("no",)))
    backward = {call[1:2] + call[3:] for call in all_calls if call[0] == "_lsg_bwd_dq_dkv_kernel"}
    assert backward >= expected | other_sizes


@pytest.mark.parametrize("subset", ["quick", "ci", "all"])
def test_a_label_is_of_one_kernel(subset):
    labels = Counter(kernel.label for kernel in kernels_of(planned_calls(subset, list(GPUS))).values())
    assert {label: count for label, count in labels.items() if count > 1} == {}


def is_served(wanted, label):
    fields = zip(astuple(wanted), astuple(label), strict=True)
    return all(value in field.split("/") for value, field in fields)


def test_a_call_finds_its_kernels_by_label(everything):
    """Each launch of a call has a kernel whose label names the call's type, pass, dtype, sizes, mask and dropout."""
    labels = [kernel.label for kernel in everything.values()]
    for call in planned_calls("ci", ["sm_90", "gfx942"]):
        dtype, yes = str(call.dtype).removeprefix("torch."), {True: "yes", False: "no"}
        values = (str(call.head_dim), "128", "1", yes[call.has_mask], yes[call.has_dropout])
        for name, launch in call.launches():
            wanted = Label(launch.kernel.__name__, call.sparsity_type, name, dtype, *values, call.target)
            found = [x for x in labels if is_served(wanted, x)]
            assert len(found) == 1, wanted


def only(calls, kernel):
    """The key and kernel of this name, of which the calls have one."""
    ((key, found),) = [(key, x) for key, x in kernels_of(calls).items() if x.label.kernel == kernel]
    return key, found


@pytest.mark.usefixtures("cache")
def test_a_kernel_is_compiled_once(monkeypatch, committed):
    call = PlannedCall("none", torch.bfloat16, 64, False, False, "sm_90")
    key, kernel = only([call], "_lsg_fwd_combine_kernel")
    figures = static.figures_of(key, kernel)
    assert figures.registers > 0
    assert figures.spill_bytes == figures.tensor_core_instructions == 0
    row = Row(kernel.label, figures, kernel.launch.tuning.num_warps, 1, triton.__version__, key)
    assert 0 < row.occupancy <= 1
    assert [x.figures for x in committed if x.key == key] in ([figures], [])
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    assert static.figures_of(key, kernel) == figures


@pytest.mark.usefixtures("cache")
def test_known_figures_are_not_compiled(monkeypatch):
    calls = [PlannedCall("pooling", torch.float16, 64, True, False, "sm_90")]
    kernels = kernels_of(calls)
    by_key = [replace(changed(GOOD, registers=7), key=key, stage=key) for key in kernels]
    by_stage = [replace(changed(GOOD, registers=9), key="", stage=stage_of(x)) for x in kernels.values()]
    for known, registers in ((by_key, 7), (by_stage, 9)):
        rows, errors = static.compile_all(calls, 1, known)
        assert errors == []
        assert {row.key: row.figures.registers for row in rows} == dict.fromkeys(kernels, registers)
        assert {row.label for row in rows} == {kernel.label for kernel in kernels.values()}
    assert {row.stage for row in rows} == {row.stage for row in by_stage}


@pytest.mark.usefixtures("cache")
def test_the_attention_kernel_uses_tensor_cores_and_async_copies():
    call = PlannedCall("none", torch.float16, 64, False, False, "sm_80")
    key, kernel = only([call], "_lsg_fwd_kernel")
    figures = static.figures_of(key, kernel)
    assert figures.tensor_core_instructions > 100
    assert figures.async_copies > 0
    assert faults(Row(kernel.label, figures, 4, 2, triton.__version__, key)) == []


@triton.jit
def _adds(x_ptr, values: tl.constexpr):
    """One program: add to memory without an order."""
    offs = tl.arange(0, values)
    tl.atomic_add(x_ptr, tl.sum(tl.load(x_ptr + offs), 0))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_atomics_are_counted(target):
    """A kernel with atomics is seen to have them, so the committed rows that count none are right."""
    source = ASTSource(_adds, {"x_ptr": "*fp32", "values": "constexpr"}, {(1,): 64})
    assert compile_and_read(source, target, {}).float_atomics > 0


@pytest.mark.usefixtures("cache")
def test_what_does_not_compile_is_a_result(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(triton, "compile", fail)
    error = static.figures_of(*only([PlannedCall("norm", torch.float16, 64, True, False, "sm_90")], "_lsg_norm_kernel"))
    assert error == (
        "_lsg_norm_kernel types=norm passes=forward dtype=float16 head_dim=64 block_size=128 num_globals=1 mask=yes "
        "dropout=no target=sm_90: RuntimeError: no registers left"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spill_bytes": 65}, "spills 65 bytes, more than 64"),
        ({"shared_bytes": 99 * 1024 + 1}, "takes 101377 bytes of shared memory, more than 101376"),
        ({"tensor_core_instructions": 0}, "has no tensor-core instruction"),
        ({"float_atomics": 1}, "has 1 atomics on floats, which make the order of sums depend on timing"),
    ],
)
def test_faults(change, what):
    assert faults(GOOD) == []
    assert faults(changed(GOOD, **change)) == [f"{GOOD.label} {what}"]


def test_what_most_calls_take_may_spill_a_register():
    """64 bytes elsewhere: on other GPUs, in other types and sizes, with dropout."""
    label = replace(GOOD.label, target="sm_90")
    for changes, spilled in (({}, 8), ({"head_dim": "128", "target": "sm_80"}, 8), ({"dropout": "yes"}, 64)):
        row = replace(changed(GOOD, spill_bytes=spilled), label=replace(label, **changes))
        assert faults(row) == []
        assert faults(changed(row, spill_bytes=spilled + 1)) == [
            f"{row.label} spills {spilled + 1} bytes, more than {spilled}"
        ]


@pytest.mark.parametrize(("row", "status"), [(GOOD, 0), (changed(GOOD, spill_bytes=999), 1)])
def test_status(row, status, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "compile_all", lambda calls, jobs, known: ([row], []))
    assert static.main(["--csv", str(tmp_path / "rows.csv")]) == status
    assert read_rows(tmp_path / "rows.csv") == [row]
    assert (tmp_path / "rows.md").read_text() == to_markdown([row], "rows.csv")
    monkeypatch.setattr(static, "compile_all", lambda calls, jobs, known: ([row], ["one did not compile"]))
    assert static.main([]) == 1


def test_only_a_named_file_is_brought_up_to_date(monkeypatch, tmp_path):
    """Without one, nothing is taken from rows that are kept: a gate compiles the kernels."""
    taken = []
    monkeypatch.setattr(static, "compile_all", lambda calls, jobs, known: (taken.append(known), ([GOOD], []))[1])
    for arguments in ([], ["--csv", str(tmp_path / "rows.csv")], ["--csv", str(tmp_path / "rows.csv")]):
        assert static.main(arguments) == 0
    assert taken == [None, [], [GOOD]]


def test_a_file_of_other_columns_is_an_error(tmp_path):
    (tmp_path / "rows.csv").write_text("kernel,target\na,b\n")
    with pytest.raises(ValueError, match=r"expected the columns .*'stage'\], got \['kernel', 'target'\]"):
        read_rows(tmp_path / "rows.csv")


def test_summary():
    """The worst of each figure by kernel and GPU, over different variants."""
    other_gpu = replace(GOOD, label=replace(GOOD.label, target="sm_100"))
    rows = [GOOD, changed(GOOD, registers=40, spill_bytes=65, shared_bytes=1024), other_gpu]
    first, second = summarize(rows)
    assert first == ("_lsg_fwd_kernel", "sm_86", 2, 255, 65, 99 * 1024, GOOD.blocks_per_sm, 1)
    assert second == ("_lsg_fwd_kernel", "sm_100", 1, 255, 64, 99 * 1024, other_gpu.blocks_per_sm, 0)
    assert GOOD.blocks_per_sm < rows[1].blocks_per_sm


def test_committed_rows_are_of_these_kernels_and_without_faults(committed, everything):
    assert [fault for row in committed for fault in faults(row)] == []
    kernels = {kernel.label.kernel for kernel in everything.values()}
    assert {(row.label.kernel, row.label.target) for row in committed} == set(product(kernels, GPUS))
    assert len({row.label for row in committed}) == len(committed) == len({row.key for row in committed})
    if {row.triton for row in committed} == {triton.__version__}:
        rows = {row.key: row.label for row in committed}
        labels = [
            {key: kernel.label for key, kernel in kernels.items()}
            for kernels in (everything, kernels_of(planned_calls("ci", list(GPUS))))
        ]
        assert rows in labels, "the kernels have changed: run make static"


def test_committed_files_are_what_the_rows_give(committed, tmp_path):
    write_rows(tmp_path / "static.csv", committed)
    assert RESULTS.read_text(encoding="utf-8") == (tmp_path / "static.csv").read_text(encoding="utf-8")
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == to_markdown(committed, RESULTS.name)
