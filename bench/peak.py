"""A step's peak memory beyond weights and inputs, from CUDA's statistics or a fresh process's high-water mark.

It includes the step's results and gradients, but nothing that a first step leaves, such as an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench import fresh, peers
from bench.cases import FORWARD, TimedCase
from bench.subject import Subject, make_step, make_subject
from lsg_attn.memory import peak_memory

_WARM_TOKENS = 1024


def peak_bytes(name: str, case: TimedCase) -> int | None:
    """On a CPU: the peak of a peer's step in a process of its own, or None where the system does not report it."""
    return fresh.call(_peak, name, case)


def _peak(name: str, case: TimedCase) -> int | None:
    (peer,) = (peer for peer in peers.of_level(case.level) if peer.name == name)
    if case.level == "encoder" and case.step == FORWARD:  # libraries allocate here what they allocate once
        short = replace(case, tokens=min(case.tokens, _WARM_TOKENS))
        make_step(make_subject(peer, short), case.step)()
    subject = make_subject(peer, case)
    step = make_step(subject, case.step)
    if case.level == "attention" or case.step != FORWARD:
        step()
    subject.clear_gradients()
    peak = peak_memory(step)
    return None if peak is None else peak.growth


def cuda_peak_bytes(subject: Subject, step: Callable[[], object]) -> int:
    """On a GPU: how far allocated memory grows at the peak of a step that has run before."""
    subject.clear_gradients()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before: int = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
