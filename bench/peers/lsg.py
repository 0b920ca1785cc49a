"""This library: each implementation of the attention, and LSG-BART's encoder."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import TimedCase
from bench.flops import num_scores
from bench.peers.base import (
    Adapter,
    Attend,
    AttentionPeer,
    EncoderPeer,
    Parts,
    bart_parts,
    bart_sizes,
    pairs_obstacle,
)
from lsg_attn import lsg_attention
from lsg_attn.call import Call
from lsg_attn.fused.limits import unsupported_reasons


class LSGPeer(Adapter):
    """What computes LSG attention: it has to agree with the reference, and its scores are the pattern's."""

    is_lsg = True

    def scores(self, case: TimedCase) -> int:
        """Raw and compressed keys of all queries, padding aside."""
        return num_scores(case.pattern, case.tokens)

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The reference's output."""
        return lsg_attention(query, key, value, case.pattern, implementation="reference")


class LSGImplementation(LSGPeer, AttentionPeer):
    """``lsg_attention`` by one of its implementations."""

    def __init__(self, implementation: str) -> None:
        self.name, self._implementation = f"lsg {implementation}", implementation

    def obstacle(self, case: TimedCase) -> str | None:
        """Of the kernels: what ``implementation="triton"`` would raise; of the reference: memory."""
        if self._implementation == "reference":
            slots = case.pattern.num_slots(case.tokens)
            pairs = case.length * (case.length + slots)
            # scores, mask, probabilities, and with a backward their gradients; it is for checking, and slow
            return pairs_obstacle(case, pairs, 6, 2 << 30, "dense scores and probabilities")
        return _obstacle(self._implementation, case)

    def prepare(self, case: TimedCase) -> Attend:
        """The function with its pattern."""
        return partial(lsg_attention, pattern=case.pattern, implementation=self._implementation)


class LSGEncoder(LSGPeer, EncoderPeer):
    """The encoder of ``lsg_attn.bart``."""

    def __init__(self, implementation: str) -> None:
        self.name, self._implementation = f"lsg {implementation}", implementation

    def obstacle(self, case: TimedCase) -> str | None:
        """What the attention can not run."""
        return super().obstacle(case) or _obstacle(self._implementation, case)

    def build(self, case: TimedCase) -> nn.Module:
        """LSG-BART's encoder."""
        model: nn.Module = lsg_encoder(case, self._implementation)
        return model

    def parts(self, model: Any) -> Parts:
        """Of BART's names."""
        attention = model.layers[0].self_attn
        return bart_parts(attention)


def lsg_encoder(case: TimedCase, implementation: str) -> Any:
    """LSG-BART's encoder of a case's size and pattern."""
    from lsg_attn.bart import LSGBartConfig
    from lsg_attn.bart.modeling import LSGBartEncoder

    config = LSGBartConfig(
        **bart_sizes(case.size),
        **asdict(case.pattern),
        max_position_embeddings=case.tokens,
        attention_implementation=implementation,
    )
    return LSGBartEncoder(config)


def _obstacle(implementation: str, case: TimedCase) -> str | None:
    if implementation != "triton":
        return None
    try:
        example = torch.empty(1, case.size.heads, 1, case.size.head_dim, dtype=case.dtype, device=case.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return str(error).splitlines()[0]
    call = Call(example, example, example, None, None, (), 0.0, 1.0, case.pattern)
    return "; ".join(unsupported_reasons(call)) or None
