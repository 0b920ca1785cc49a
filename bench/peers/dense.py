"""Dense attention: PyTorch's `scaled_dot_product_attention`, and transformers' BART encoder, which calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import SEQ2SEQ, TimedCase
from bench.peers.base import (
    Adapter,
    Attend,
    AttentionPeer,
    EncoderPeer,
    Parts,
    bart_parts,
    bart_sizes,
    masked_attention,
    modeling_module,
)


class _Dense(Adapter):
    name, label, color = "dense", "dense attention", "#1f77b4"

    def scores(self, case: TimedCase) -> int:
        """All pairs."""
        return case.tokens**2

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A softmax over the keys of all tokens; the globals are left out."""
        query, key, value = (x[:, :, -case.tokens :] for x in (query, key, value))
        return masked_attention(query, key, value, query.new_ones(query.shape[2], key.shape[2]))


class DenseAttention(_Dense, AttentionPeer):
    """Attention among the tokens, without the globals and without a mask: PyTorch can choose its flash kernels."""

    def prepare(self, case: TimedCase) -> Attend:
        """PyTorch's function on the tokens after the globals."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x[:, :, -case.tokens :] for x in (query, key, value))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

        return attend


class BartEncoder(_Dense, EncoderPeer):
    """BART's, with ``attn_implementation="sdpa"``."""

    preload = (modeling_module("bart"),)
    groups = (SEQ2SEQ,)

    def build(self, case: TimedCase) -> nn.Module:
        """The encoder alone, with as many positions as there are tokens."""
        from transformers import BartConfig
        from transformers.models.bart.modeling_bart import BartEncoder as Encoder

        config = BartConfig(
            **bart_sizes(case.size),
            max_position_embeddings=case.tokens,
            attn_implementation="sdpa",
        )
        model: nn.Module = Encoder(config)
        return model

    def parts(self, model: Any) -> Parts:
        """The parts have BART's names."""
        return bart_parts(model.layers[0].self_attn)
