"""LSGMultiheadAttention: LSG attention where a module of PyTorch expects its own multi-head attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layer import LSGAttention
from .pattern import LSGPattern

if TYPE_CHECKING:
    from typing_extensions import Self


class LSGMultiheadAttention(LSGAttention):
    """:class:`LSGAttention` with the calls of :class:`torch.nn.MultiheadAttention`, for self-attention.

    It can be the ``self_attn`` of a :class:`torch.nn.TransformerEncoderLayer`::

        layer.self_attn = LSGMultiheadAttention.from_multihead(layer.self_attn, LSGPattern())

    Args:
        embed_dim, num_heads, pattern, options: as in :class:`LSGAttention`.
        batch_first: whether inputs are (batch, length, embed_dim), else (length, batch, embed_dim).
    """

    # Modules of PyTorch ask for these, to choose a fast path of their own. There is none.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self, embed_dim: int, num_heads: int, pattern: LSGPattern | None = None, *, batch_first: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(embed_dim, num_heads, pattern, **options)
        self.batch_first = batch_first

    @classmethod
    def from_multihead(
        cls, multihead: nn.MultiheadAttention, pattern: LSGPattern | None = None, *, implementation: str = "auto"
    ) -> Self:
        """See :meth:`LSGAttention.from_multihead`; with the same ``batch_first``."""
        layer = super().from_multihead(multihead, pattern, implementation=implementation)
        layer.batch_first = multihead.batch_first
        return layer

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend within each sequence.

        Args:
            query, key, value: one tensor (batch, G+T, embed_dim), or (G+T, batch, embed_dim); global positions first.
            key_padding_mask: (batch, G+T), true for padding; or of floats, -inf for padding and else 0.
            need_weights: False; :func:`lsg_attn.attention_weights` has the weights of chosen rows.
            attn_mask: None, but for a causal pattern with ``is_causal``, whose mask it then is.
            average_attn_weights: of no effect without weights.
            is_causal: whether the mask is causal, which the pattern must then be.

        Returns:
            The output, of the input's shape, and None.

        Raises:
            TypeError, ValueError: an argument asks for what LSG attention does not compute, or see
                :meth:`LSGAttention.forward`.
        """
        if key is not query or value is not query:
            raise ValueError("key, value: expected the tensor that query is, as LSG attention is self-attention")
        if need_weights:
            raise ValueError(
                "need_weights: expected False, as no matrix of weights is computed; lsg_attn.attention_weights has "
                "those of chosen rows"
            )
        if is_causal and not self.pattern.causal:
            raise ValueError("is_causal: expected False, as the pattern is not causal; see LSGPattern(causal=True)")
        if attn_mask is not None and not is_causal:
            raise ValueError("attn_mask: expected None, as the pattern says who sees whom")
        mask = None if key_padding_mask is None else _is_token(key_padding_mask)
        if self.batch_first:
            return super().forward(query, mask), None
        return super().forward(query.transpose(0, 1), mask).transpose(0, 1), None


def _is_token(key_padding_mask: Tensor) -> Tensor:
    """The mask, true for a token, from PyTorch's, which is true or -inf for padding."""
    if not key_padding_mask.is_floating_point():
        return key_padding_mask == 0
    is_padding = key_padding_mask == -torch.inf
    is_known = (is_padding | (key_padding_mask == 0)).all()
    message = "key_padding_mask: expected 0 for tokens and -inf for padding, got other numbers"
    if key_padding_mask.is_cpu and not torch.compiler.is_compiling():
        if not is_known:
            raise ValueError(message)
    else:
        torch._assert_async(is_known, message)  # does not wait for the device
    return ~is_padding
