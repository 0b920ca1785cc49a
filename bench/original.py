"""The original attention (lsg-converter 0.1.9, eager PyTorch), taken from the installed package, never copied here.

Its modules import names that today's transformers no longer has, so only the class definitions that the attention
needs are executed.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lsg_attn import LSGPattern

_CLASSES = ("BaseSelfAttention", "BaseAttentionProduct", "LSGAttentionProduct", "LSGBartEncoderSelfAttention")


class OriginalAttention:
    """``original(query, key, value)`` -> (batch, G+T, heads * head_dim), in evaluation, without padding.

    Raises:
        ModuleNotFoundError: lsg-converter is not installed.
    """

    def __init__(self, pattern: LSGPattern, heads: int, head_dim: int) -> None:
        names = ("block_size", "sparse_block_size", "sparsity_factor", "sparsity_type", "num_global_tokens")
        config = SimpleNamespace(
            **{name: getattr(pattern, name) for name in names},
            lsh_num_pre_rounds=pattern.lsh_num_pre_rounds,
            attention_dropout=0.0,
        )
        attention_class = _original_classes()["LSGBartEncoderSelfAttention"]
        self._attention = attention_class(config, heads * head_dim, heads, 0.0).eval()
        self._num_global_tokens = pattern.num_global_tokens

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It can not do without a mask; an all-zero one is what its encoder would pass.
        mask = query.new_zeros(query.shape[0], 1, 1, query.shape[2] - self._num_global_tokens)
        out: Tensor = self._attention.not_causal_forward(query, key, value, attention_mask=mask)
        return out


def _original_classes() -> dict[str, Any]:
    spec = importlib.util.find_spec("lsg_converter")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lsg_converter is not installed: pip install lsg-converter==0.1.9")
    tree = ast.parse((Path(spec.origin).parent / "bart/modeling_lsg_bart.py").read_text())
    classes: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in _CLASSES]
    names: dict[str, Any] = {"__name__": "lsg_converter_attention", "torch": torch, "nn": nn, "math": math}
    exec(compile(ast.Module(classes, []), spec.origin, "exec"), names)
    return names
