"""This library: each implementation of the attention, and LSG-BART's encoder."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import LONG, PATTERNS, SEQ2SEQ, TYPES_FORWARD, TimedCase
from bench.flops import num_scores
from bench.peers.base import (
    Adapter,
    Attend,
    AttentionPeer,
    EncoderPeer,
    Parts,
    bart_parts,
    bart_sizes,
    memory_reason,
)
from lsg_attn import lsg_attention
from lsg_attn.blockwise import limits as cpp_limits
from lsg_attn.call import Call
from lsg_attn.fused import limits as triton_limits

_LOOKS = {  # label and color of each implementation
    "triton": ("ours, Triton", "#d62728"),
    "cpp": ("ours, C++", "#ff9896"),
    "torch": ("ours, PyTorch", "#e377c2"),
    "reference": ("ours, the dense reference", "#c5b0d5"),
}


class LSGPeer(Adapter):
    """A peer that computes LSG attention: it must agree with the reference, and its scores are the pattern's."""

    is_lsg = True

    def scores(self, case: TimedCase) -> int:
        """The raw and compressed keys of all queries, without padding."""
        return num_scores(case.pattern, case.tokens)

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The reference's output."""
        return lsg_attention(query, key, value, case.pattern, implementation="reference")


class _Ours(LSGPeer):
    def __init__(self, implementation: str) -> None:
        self.name, self._implementation = f"lsg {implementation}", implementation
        self.label, self.color = _LOOKS[implementation]


class LSGImplementation(_Ours, AttentionPeer):
    """``lsg_attention`` with one of its implementations."""

    def __init__(self, implementation: str) -> None:
        super().__init__(implementation)
        if implementation != "reference":  # it is for checking, and slow
            self.groups = (TYPES_FORWARD, PATTERNS, LONG)

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """The reason is what asking for the implementation would raise; the reference's is memory."""
        if self._implementation == "reference":
            slots = case.pattern.num_slots(case.tokens)
            pairs = case.length * (case.length + slots)
            # scores, mask, probabilities, and with a backward their gradients
            return memory_reason(case, pairs, 6, 2 << 30, "dense scores and probabilities")
        return _reason(self._implementation, case)

    def prepare(self, case: TimedCase) -> Attend:
        """The function with the case's pattern."""
        return partial(lsg_attention, pattern=case.pattern, implementation=self._implementation)


class LSGEncoder(_Ours, EncoderPeer):
    """The encoder of ``lsg_attn.bart``."""

    preload = ("lsg_attn.bart",)
    groups = (SEQ2SEQ, PATTERNS)

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """It needs transformers, and its attention must be able to run."""
        return super().unsupported_reason(case) or _reason(self._implementation, case)

    def build(self, case: TimedCase) -> nn.Module:
        """LSG-BART's encoder."""
        model: nn.Module = lsg_encoder(case, self._implementation)
        return model

    def parts(self, model: Any) -> Parts:
        """The parts have BART's names."""
        return bart_parts(model.layers[0].self_attn)


def lsg_encoder(case: TimedCase, implementation: str) -> Any:
    """LSG-BART's encoder with a case's size and pattern."""
    from lsg_attn.models import LSGBartConfig
    from lsg_attn.models.bart import LSGBartEncoder

    config = LSGBartConfig(
        **bart_sizes(case.size),
        **asdict(case.pattern),
        max_position_embeddings=case.tokens,
        attention_implementation=implementation,
    )
    return LSGBartEncoder(config)


_LIMITS = {"triton": triton_limits.unsupported_reasons, "cpp": cpp_limits.unsupported_reasons}


def _reason(implementation: str, case: TimedCase) -> str | None:
    """Why the implementation cannot run a case, or None."""
    if implementation not in _LIMITS:
        return None
    try:
        example = torch.empty(1, case.size.heads, 1, case.size.head_dim, dtype=case.dtype, device=case.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return str(error).splitlines()[0]
    call = Call(example, example, example, None, None, (), 0.0, 1.0, case.pattern)
    return "; ".join(_LIMITS[implementation](call)) or None
