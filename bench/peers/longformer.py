"""transformers' Longformer and LED: a sliding window (arXiv 2004.05150), without global tokens, which cost time."""

from __future__ import annotations

from types import SimpleNamespace
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
    bart_sizes,
    bert_parts,
    bert_sizes,
    masked_attention,
    missing_transformers,
    modeling_module,
)

WINDOW = 512  # keys besides the token's own, as in allenai/longformer-base-4096; LED's checkpoints have 1024


class _SlidingWindow(Adapter):
    def scores(self, case: TimedCase) -> int:
        """The pairs in the band; the corners outside it, which are multiplied too, do not count."""
        return case.tokens * (WINDOW + 1)

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A softmax over half a window on each side of a token; the globals are left out."""
        query, key, value = (x[:, :, -case.tokens :] for x in (query, key, value))
        position = torch.arange(case.tokens)
        near = (position[:, None] - position).abs() <= WINDOW // 2
        return masked_attention(query, key, value, near)


class _Longformer(_SlidingWindow):
    name, label, color = "longformer", "Longformer", "#2ca02c"
    preload = (modeling_module("longformer"),)


class LongformerAttention(_Longformer, AttentionPeer):
    """Longformer's self-attention on the tokens after the globals, with its projections replaced by their results."""

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """It needs transformers and whole windows."""
        if case.tokens % WINDOW:
            return f"{case.tokens} tokens are not whole windows of {WINDOW}"
        return missing_transformers()

    def prepare(self, case: TimedCase) -> Attend:
        """Its module, whose projections return queries, keys and values that are given."""
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        size = case.size
        config = SimpleNamespace(
            hidden_size=size.width,
            num_attention_heads=size.heads,
            attention_window=[WINDOW],
            attention_probs_dropout_prob=0.0,
        )
        layer = LongformerSelfAttention(config, 0).eval()
        mask = torch.zeros(case.batch, case.tokens, dtype=case.dtype, device=case.device)
        nothing = torch.zeros_like(mask, dtype=torch.bool)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # (batch, heads, G+T, head_dim) -> (batch, T, width)
            query, key, value = (x[:, :, -case.tokens :].transpose(1, 2).flatten(2) for x in (query, key, value))
            # its projections return (T, batch, width), and it scales the query in place
            layer.query, layer.key, layer.value = (_Given(x.transpose(0, 1)) for x in (query.clone(), key, value))
            context = layer(query, mask, is_index_masked=nothing, is_index_global_attn=nothing, is_global_attn=False)[0]
            out: Tensor = context.unflatten(-1, (size.heads, -1)).transpose(1, 2)
            return out

        return attend


class _Given(nn.Module):
    """A projection whose result is given."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x

    def forward(self, _: Tensor) -> Tensor:
        return self._x


class LongformerEncoder(_Longformer, EncoderPeer):
    """``LongformerModel`` without its pooler."""

    def build(self, case: TimedCase) -> nn.Module:
        """An encoder of RoBERTa's kind: its positions begin at 2."""
        from transformers import LongformerConfig, LongformerModel

        config = LongformerConfig(
            **bert_sizes(case.size),
            max_position_embeddings=case.tokens + 2,
            attention_probs_dropout_prob=0.0,
            attention_window=WINDOW,
        )
        model: nn.Module = LongformerModel(config, add_pooling_layer=False)
        return model

    def parts(self, model: Any) -> Parts:
        """The parts have BERT's names; the projections for global tokens are not used."""
        return bert_parts(model)


class LEDEncoder(_SlidingWindow, EncoderPeer):
    """The encoder of BART's kind with Longformer's attention."""

    name, label, color = "led", "LED", "#98df8a"
    preload = (modeling_module("led"),)
    groups = (SEQ2SEQ,)

    def build(self, case: TimedCase) -> nn.Module:
        """The encoder alone, with as many positions as there are tokens."""
        from transformers import LEDConfig
        from transformers.models.led.modeling_led import LEDEncoder as Encoder

        config = LEDConfig(
            **bart_sizes(case.size),
            max_encoder_position_embeddings=case.tokens,
            attention_window=WINDOW,
        )
        model: nn.Module = Encoder(config)
        return model

    def parts(self, model: Any) -> Parts:
        """Its query, key and value layers are in a module of their own."""
        attention = model.layers[0].self_attn
        inner = attention.longformer_self_attn
        return Parts(inner.query, inner.key, inner.value, attention.output)
