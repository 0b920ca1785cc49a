"""The bench: its adapter to the original, its gate, its statistics. Speed itself is not tested."""

import pytest
import torch

from bench import cpu
from bench.original import OriginalAttention
from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.memory import peak_growth
from lsg_attn.testing import assert_close, make_inputs


@pytest.mark.parametrize("sparsity_type", [t for t in SPARSITY_TYPES if t != "lsh"])
def test_adapter_computes_the_same_attention(sparsity_type):
    pattern = LSGPattern(8, 8, 2, sparsity_type)
    inputs = make_inputs(2, 4, 1 + 64, 8)
    expected = lsg_attention(*inputs[:3], pattern).transpose(1, 2).flatten(2)
    assert_close("out", OriginalAttention(pattern, 4, 8)(*inputs[:3]), expected)


def test_gate_stops_a_wrong_implementation(monkeypatch):
    cpu.gate(LSGPattern(8, 8, 2))
    monkeypatch.setattr(cpu, "run_attention", lambda inputs, pattern: {"out": torch.zeros_like(inputs.query)})
    with pytest.raises(AssertionError, match="out: relative RMS error"):
        cpu.gate(LSGPattern(8, 8, 2))


def test_repetitions_are_interleaved_and_the_first_is_not_counted():
    calls = []
    times = cpu.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(ts) for ts in times.values()] == [2, 2]


def test_ratio_is_the_median_of_ratios():
    assert cpu.ratio({"x": [1.0, 6.0, 3.0], "y": [1.0, 2.0, 3.0]}, "x", "y") == 1.0


@pytest.mark.parametrize("cached", [True, False])
def test_matmul_bound_has_the_attentions_flops(cached, monkeypatch):
    monkeypatch.setattr(cpu, "TOKENS", 4 * 8)
    pattern = LSGPattern(8, 8, 2)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        cpu.matmul_bound(pattern, cached)()
    keys = 1 + 2 * 8 + 3 * 8
    assert counter.get_total_flops() == 4 * cpu.HEADS * 32 * keys * cpu.HEAD_DIM


def test_peak_growth_sees_memory_that_is_freed_again():
    results = []
    peak = peak_growth(lambda: results.append(torch.ones(50_000_000).sum().item()))
    assert results == [50_000_000]
    assert peak is None or 190e6 < peak < 260e6


def test_every_measurement_runs(monkeypatch):
    monkeypatch.setattr(cpu, "TOKENS", 512)
    monkeypatch.setattr(cpu, "HEADS", 2)
    rows = [cpu.attention_row(LSGPattern(), 1), *cpu.dtype_rows(1), *cpu.length_rows((512, 1024), 1)]
    assert all(x > 0 for row in rows for x in row.values() if isinstance(x, float))
    assert [row["tokens"] for row in rows[-2:]] == [512, 1024]
    for who in ("ours", "original"):
        for what in ("fwd", "f+b"):
            peak = cpu.peak_scratch(who, what, "norm")
            assert peak is None or peak > -0.5
    assert cpu.as_table("title", rows[:1]).row_count == 1
    assert cpu.machine()["torch"] == torch.__version__
