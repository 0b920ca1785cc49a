"""The parts of the bench that need a GPU: its clock, its memory, and the tuning of schedules."""

from dataclasses import replace

import pytest
import torch

from bench import flops, peers, tune
from bench.cases import BACKWARD, FORWARD, SIZES, Section, TimedCase
from bench.flops import LARGE
from bench.gpu.rehearsal import Event
from bench.measure import measure
from bench.subject import check
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.cli.sizes import Size
from lsg_attn.fused.schedules import Schedule, Tuning

IS_REAL = bool(torch.version.cuda or torch.version.hip)
CASE = TimedCase("attention", "tiny", 96, pattern=LSGPattern(16, 16, 2), device="cuda")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Stand-ins for a GPU's events and statistics if there is no GPU."""
    if not IS_REAL:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5096)
        for name in ("empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.parametrize("step", [FORWARD, BACKWARD])
def test_kernels_have_times_ratios_and_peaks(step, monkeypatch):
    monkeypatch.setattr("bench.subject.CHECK_TOKENS", 96)
    monkeypatch.setitem(SIZES, "tiny", Size(32, 1, 2, 32))
    monkeypatch.setitem(flops._ROWS, "cuda", 16)
    case = replace(CASE, step=step)
    result = measure(Section("s", (case,), seconds=0, least=1, memory=(96,)), case, ["lsg triton", "dense"], {})
    assert result.failures == []
    assert [figure["peer"] for figure in result.figures] == ["lsg triton", "dense", LARGE]
    assert result.figures[0]["ratio"] == [1, 1, 1]
    assert all(figure["ms"][0] > 0 for figure in result.figures)
    peaks = [figure["peak_bytes"] for figure in result.figures[:2]]
    assert all(peak > 0 for peak in peaks) if IS_REAL else peaks == [4096] * 2


@pytest.mark.skipif(not IS_REAL, reason="eager peers on a GPU, and flex's backward, need one")
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("peer", peers.ATTENTION, ids=lambda peer: peer.name)
def test_attentions_agree_with_the_reference_on_a_gpu(peer, sparsity_type):
    case = TimedCase(
        "attention", "large", 4096, BACKWARD, pattern=LSGPattern(sparsity_type=sparsity_type), device="cuda"
    )
    if reason := peer.unsupported_reason(case):
        pytest.skip(reason)
    check(peer, case)  # raises


@pytest.mark.parametrize("is_backward", [False, True])
def test_schedule_is_timed_only_if_its_result_is_right(is_backward):
    trial = tune.Trial(LSGPattern(32, 32, 2), (1, 1, 1 + 96, 16), torch.float16, 0.0, is_backward)
    other = Schedule(32, 16, Tuning(4, 1))
    assert other != trial.row
    measured = trial.measure(other, seconds=0.0)
    assert measured.failure == ""
    assert measured.to_row is not None
    trial._expected = [x + 1 for x in trial._expected]
    wrong = trial.measure(other, seconds=0.0)
    assert wrong.seconds is None
    assert wrong.failure.startswith("AssertionError: result: relative RMS error")
