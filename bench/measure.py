"""The figures of one case: each peer is checked, run once, and timed in turn with the others."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from bench import peers
from bench.allocator import keep_freed_memory
from bench.cases import FORWARD, OWN, Section, TimedCase, ours_of
from bench.flops import BOUNDS, LARGE, Bound, flops, matmul_bounds, num_scores
from bench.peak import cuda_peak_bytes
from bench.peers.base import Peer
from bench.subject import DisagreementError, Subject, check, make_step, make_subject
from bench.timing import Clock, Step, StepError, interleave, ratio, spread

Verdicts = dict[tuple[Any, ...], str | None]


@dataclass
class Result:
    """The figures of one case, the peers skipped with their reasons, and failures."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)  # each: what failed, and the traceback
    verdicts: Verdicts = field(default_factory=dict)  # of checks: why a peer is not measured, or None
    is_gpu_lost: bool = False  # after an error that leaves the GPU unusable for this process


def measure(section: Section, case: TimedCase, names: Sequence[str], verdicts: Verdicts) -> Result:
    """Time the peers of these names, except those whose check fails; ``verdicts`` are those of earlier checks.

    If a peer makes the GPU unusable, the result has no figures and that peer is skipped. The others can then be
    measured in another process.
    """
    if section.keeps_memory:
        try:
            keep_freed_memory()
        except OSError as error:
            return all_skipped(section, case, names, str(error))
    _quiet_transformers()
    result, clock, bounds = Result(verdicts=dict(verdicts)), Clock(case.device), matmul_bounds(case)
    able: list[str] = []
    entries: dict[str, _Entry] = {}
    for peer in asked(section, case, names):
        entry: _Entry | str | None = peer.unsupported_reason(case)
        if entry is None:
            able.append(peer.name)
            entry = _disagreement(peer, case, result) or _prepare(peer, case, clock, result)
        if isinstance(entry, str):
            result.skipped.append(named(section, case, peer.name) | {"reason": entry})
        else:
            entries[peer.name] = entry
        if result.is_gpu_lost:
            return result
    times = _interleave(section, case, entries, bounds, clock, result)
    scores = {name: entry.scores for name, entry in entries.items()}
    scores |= dict.fromkeys(bounds, num_scores(case.pattern, case.tokens))
    for name in times:
        figure = named(section, case, name) | _of_times(case, times, name, ours_of(able), scores[name])
        if name not in BOUNDS:
            entry = entries[name]
            figure |= {"setup_ms": 1e3 * entry.subject.setup_seconds, "first_ms": 1e3 * entry.first_seconds}
            if case.device == "cuda" and case.tokens in section.memory:
                figure["peak_bytes"] = cuda_peak_bytes(entry.subject, entry.step)
        result.figures.append(figure)
    return result


def asked(section: Section, case: TimedCase, names: Sequence[str]) -> list[Peer]:
    """The peers of these names that a section measures."""
    level = peers.of_level(case.level)
    return [peer for peer in level if peer.name in names and (not section.group or section.group in peer.groups)]


def all_skipped(section: Section, case: TimedCase, names: Sequence[str], reason: str) -> Result:
    """The result of a case that no peer ran."""
    skipped = [named(section, case, peer.name) | {"reason": reason} for peer in asked(section, case, names)]
    return Result(skipped=skipped)


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def named(section: Section, case: TimedCase, name: str) -> dict[str, Any]:
    """The fields that every record begins with."""
    return {"section": section.title, "compares": section.compares, "case": case, "peer": name}


class _Entry(NamedTuple):
    """A peer that is ready to be timed."""

    subject: Subject
    step: Step
    scores: int
    first_seconds: float


def _prepare(peer: Peer, case: TimedCase, clock: Clock, result: Result) -> _Entry | str:
    """A peer that has run the case once, or the reason that it cannot."""
    try:
        subject = make_subject(peer, case)
        step = make_step(subject, case.step)
        return _Entry(subject, step, peer.scores(case), clock.seconds(step))
    except Exception as error:
        reason = _failure(peer.name, error, result)
    _free(result)
    return reason


def _disagreement(peer: Peer, case: TimedCase, result: Result) -> str | None:
    """Why a peer is not measured, if its check fails, or None. Verdicts are kept; a backward has its own."""
    pattern, has_backward = case.pattern if peer.is_lsg else None, case.step != FORWARD
    key = (peer.name, case.level, has_backward, case.dtype_name, case.device, pattern)
    if key not in result.verdicts:
        result.verdicts[key] = None
        try:
            check(peer, case)
        except DisagreementError as error:
            result.verdicts[key] = f"it does not agree with the reference: {error}"
            result.failures.append({"what": str(error), "traceback": traceback.format_exc()})
        except Exception as error:
            result.verdicts[key] = _failure(peer.name, error, result)
        _free(result, has_failed=result.verdicts[key] is not None)
    return result.verdicts[key]


def _interleave(
    section: Section,
    case: TimedCase,
    entries: dict[str, _Entry],
    bounds: dict[str, Bound],
    clock: Clock,
    result: Result,
) -> dict[str, list[float]]:
    """The seconds of the entries and the bounds; an entry that fails here is left out after all."""
    while entries and not result.is_gpu_lost:
        steps = {name: timed.step for name, timed in (entries | bounds).items()}
        try:
            times = interleave(steps, clock, section.seconds, section.least)
            return times | {name: [bound.scale * x for x in times[name]] for name, bound in bounds.items()}
        except StepError as error:
            if error.name in BOUNDS:
                raise
            name, reason = error.name, _failure(error.name, error.__cause__ or error, result)
        result.skipped.append(named(section, case, name) | {"reason": reason})
        del steps, entries[name]  # and with them what the error still refers to
        _free(result)
    return {}


def _failure(name: str, error: BaseException, result: Result) -> str:
    """An error as the reason to skip a peer. If the peer is ours, it is a failure of the run too."""
    reason = reason_of(error)
    if name in OWN and not isinstance(error, torch.OutOfMemoryError):
        text = "".join(traceback.format_exception(error))
        result.failures.append({"what": f"{name}: {reason}", "traceback": text})
    result.is_gpu_lost = is_gpu_lost()
    return reason


def is_gpu_lost() -> bool:
    """Whether CUDA is unusable: after an access out of bounds, for example, every later call fails with that error."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _free(result: Result, has_failed: bool = True) -> None:
    """Free the memory that an error or a check held. What an error refers to, it refers to in circles."""
    if has_failed:
        gc.collect()
    if torch.cuda.is_available() and not result.is_gpu_lost:
        torch.cuda.empty_cache()


def _of_times(
    case: TimedCase, times: dict[str, list[float]], name: str, ours: str | None, scores: int
) -> dict[str, Any]:
    """A peer's figures: ``ratio`` is its time over ours, ``over_matmul`` its time over one large product's.

    If ours failed, there is no ratio: a ratio to another of our implementations would be mistaken for it.
    """
    seconds = spread(times[name])
    return {
        "repetitions": len(times[name]),
        "ms": [1e3 * x for x in seconds],
        "ratio": list(ratio(times[name], times[ours])) if ours in times else None,
        "over_matmul": list(ratio(times[name], times[LARGE])),
        "us_per_token": 1e6 * seconds.median / (case.batch * case.tokens),
        "tflops": flops(case, scores) / seconds.median / 1e12,
    }


def _quiet_transformers() -> None:
    if find_spec("transformers"):
        from transformers.utils import logging

        logging.set_verbosity_error()
