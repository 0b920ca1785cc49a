"""Dense attention: PyTorch's `scaled_dot_product_attention`, and transformers' BART encoder, which calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import TimedCase
from bench.peers.base import (
    Adapter,
    Attend,
    AttentionPeer,
    EncoderPeer,
    Parts,
    bart_parts,
    bart_sizes,
    masked_attention,
)


class _Dense(Adapter):
    name = "dense"

    def scores(self, case: TimedCase) -> int:
        """All pairs."""
        return case.tokens**2

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A softmax over all keys of the tokens after the globals."""
        query, key, value = (x[:, :, -case.tokens :] for x in (query, key, value))
        return masked_attention(query, key, value, query.new_ones(query.shape[2], key.shape[2]))


class DenseAttention(_Dense, AttentionPeer):
    """Of the tokens after the globals, without a mask: flash attention where PyTorch has one."""

    def prepare(self, case: TimedCase) -> Attend:
        """PyTorch's function."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x[:, :, -case.tokens :] for x in (query, key, value))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

        return attend


class BartEncoder(_Dense, EncoderPeer):
    """BART's, with ``attn_implementation="sdpa"``."""

    def build(self, case: TimedCase) -> nn.Module:
        """BART's encoder, with as many positions as there are tokens."""
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
        """Of its first layer."""
        attention = model.layers[0].self_attn
        return bart_parts(attention)
