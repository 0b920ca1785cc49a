"""The original (lsg-converter 0.1.9, eager PyTorch), run from the installed package.

Its modules import names that current versions of transformers do not have, so only the classes that the attention
needs are executed. Its encoder puts that attention into BART's layers. BART now calls an attention in another way, so
here the attention is in our layers, which have the same parts in the same order.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import PATTERNS, SEQ2SEQ, TYPES_FORWARD, TimedCase
from bench.peers.base import CHECK_SEED, Attend, AttentionPeer, EncoderPeer, Parts, bart_parts
from bench.peers.lsg import LSGPeer, lsg_encoder
from lsg_attn import LSGPattern, lsg_attention

_CLASSES = ("BaseSelfAttention", "BaseAttentionProduct", "LSGAttentionProduct", "LSGBartEncoderSelfAttention")


class _Original(LSGPeer):
    name, label, color = "original", "the original", "#8c564b"

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """It must be installed, and it needs whole blocks."""
        if importlib.util.find_spec("lsg_converter") is None:
            return "lsg-converter is not installed: pip install lsg-converter==0.1.9"
        if case.tokens % case.pattern.block_size:
            return f"{case.tokens} tokens are not whole blocks of {case.pattern.block_size}"
        return super().unsupported_reason(case)

    def checked_dtype(self, case: TimedCase) -> str:
        """Never a 16-bit one: there it ranks rounded norms, and so it chooses other keys than the reference."""
        return "float32" if case.dtype.itemsize < 4 else case.dtype_name

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The reference's output; for ``lsh`` with the directions that the original draws, in float32 on its device."""
        torch.manual_seed(CHECK_SEED)
        shape = 1, query.shape[1], 1, query.shape[3]
        drawn = [torch.randn(*shape, m // 2, device=case.device)[0, :, 0].cpu() for m in case.pattern.lsh_buckets]
        return lsg_attention(query, key, value, case.pattern, implementation="reference", lsh_projections=drawn or None)


class OriginalAttention(_Original, AttentionPeer):
    """Its attention after the projections."""

    groups = (TYPES_FORWARD, PATTERNS)

    def prepare(self, case: TimedCase) -> Attend:
        """``not_causal_forward`` of its layer in evaluation mode."""
        layer = original_layer(case.pattern, case.size.heads, case.size.head_dim).eval()
        # It needs a mask; without padding its encoder passes zeros.
        mask = torch.zeros(case.batch, 1, 1, case.tokens, dtype=case.dtype, device=case.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            context = layer.not_causal_forward(query, key, value, attention_mask=mask)
            out: Tensor = context.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
            return out

        return attend


class OriginalEncoder(_Original, EncoderPeer):
    """Its attention in each layer of BART's encoder."""

    preload = ("lsg_attn.bart",)
    groups = (SEQ2SEQ, PATTERNS)

    def build(self, case: TimedCase) -> nn.Module:
        """Our encoder with the attention of each layer replaced."""
        encoder = lsg_encoder(case, "auto")
        for layer in encoder.layers:
            layer.self_attn = _InLayer(layer.self_attn, case)
        model: nn.Module = encoder
        return model

    def parts(self, model: Any) -> Parts:
        """The parts have BART's names in the original too."""
        return bart_parts(model.layers[0].self_attn.original)


class _InLayer(nn.Module):
    """The original's layer behind the interface of ours: hidden states (batch, G+T, width) to the same shape."""

    def __init__(self, ours: nn.Module, case: TimedCase) -> None:
        super().__init__()
        self.original = original_layer(case.pattern, case.size.heads, case.size.head_dim)
        self.original.load_state_dict(ours.state_dict())

    def forward(self, hidden_states: Tensor, attention_mask: None) -> Tensor:
        batch, length, _ = hidden_states.shape
        mask = hidden_states.new_zeros(batch, 1, 1, length - self.original.num_global_tokens)
        out: Tensor = self.original(hidden_states, mask)[0]
        return out


def original_layer(pattern: LSGPattern, heads: int, head_dim: int) -> Any:
    """The original's self-attention layer with random weights.

    Raises:
        ModuleNotFoundError: lsg-converter is not installed.
    """
    config = SimpleNamespace(**asdict(pattern), attention_dropout=0.0)
    return _original_classes()["LSGBartEncoderSelfAttention"](config, heads * head_dim, heads, 0.0)


@lru_cache(maxsize=1)
def _original_classes() -> dict[str, Any]:
    spec = importlib.util.find_spec("lsg_converter")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lsg_converter is not installed: pip install lsg-converter==0.1.9")
    tree = ast.parse((Path(spec.origin).parent / "bart/modeling_lsg_bart.py").read_text())
    classes: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in _CLASSES]
    names: dict[str, Any] = {"__name__": "lsg_converter_attention", "torch": torch, "nn": nn, "math": math}
    exec(compile(ast.Module(classes, []), spec.origin, "exec"), names)
    return names
