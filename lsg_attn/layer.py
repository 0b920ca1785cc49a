"""LSGAttention: multi-head self-attention with an LSG pattern, a drop-in for a dense attention layer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import integer, probability, type_name
from .dispatch import check_implementation
from .functional import lsg_attention
from .pattern import LSGPattern


class LSGAttention(nn.Module):
    """Multi-head self-attention whose first G positions are global and the rest see an LSG window.

    Its parameters have BART's names (``q_proj k_proj v_proj out_proj``), so BART's checkpoints fit.

    Args:
        embed_dim: width of the input and output; a multiple of ``num_heads``.
        num_heads: attention heads, of ``embed_dim // num_heads`` each.
        pattern: which keys each query sees; by default ``LSGPattern()``.
        dropout: probability, in [0, 1), that an attention probability is zeroed in training.
        bias: whether the projections have a bias.
        implementation: as in :func:`lsg_attn.lsg_attention`.

    Raises:
        TypeError: an argument does not have the type named above.
        ValueError: a number is out of range, ``embed_dim`` is not a multiple of ``num_heads``, or there is no such
            implementation.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: LSGPattern | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.embed_dim = integer("embed_dim", embed_dim, 1)
        self.num_heads = integer("num_heads", num_heads, 1)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        self.pattern = LSGPattern() if pattern is None else pattern
        if not isinstance(self.pattern, LSGPattern):
            raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
        self.dropout = probability("dropout", dropout)
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type_name(bias)}")
        check_implementation(implementation)
        self.implementation = implementation
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            hidden_states: (batch, G+T, embed_dim), global positions first.
            attention_mask: (batch, G+T) or (batch, T), as in :func:`lsg_attn.lsg_attention`.

        Returns:
            (batch, G+T, embed_dim), of the input's dtype.

        Raises:
            TypeError: ``hidden_states`` is not a tensor.
            ValueError: ``hidden_states`` has the wrong shape, is on another device than the parameters or, except under
                autocast, has another dtype; the mask does not fit; or the implementation cannot run.
        """
        projected: Tensor = self.out_proj(self.attend(hidden_states, attention_mask))
        return projected

    def attend(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """:meth:`forward` without its last projection."""
        self._check_input(hidden_states)
        query, key, value = self.project(hidden_states)
        out = lsg_attention(
            query,
            key,
            value,
            self.pattern,
            attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            implementation=self.implementation,
        )
        return rearrange(out, "batch heads length dim -> batch length (heads dim)")

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"hidden_states: expected a torch.Tensor, got {type_name(x)}")
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"hidden_states: expected shape (batch, G+T, {self.embed_dim}), got {tuple(x.shape)}")
        projection = self.projections()[0]
        if type(projection) is not nn.Linear or projection.weight.is_meta:
            return  # adapters and quantised projections check their own input; offloaded weights are loaded in the call
        weight = projection.weight
        if x.device != weight.device:
            raise ValueError(f"hidden_states: expected the parameters' device {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"hidden_states: expected the parameters' dtype {weight.dtype}, got {x.dtype}")

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The modules that make queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, num_heads, G+T, head_dim) of hidden_states (batch, G+T, embed_dim)."""
        query, key, value = (
            rearrange(proj(hidden_states), "batch length (heads dim) -> batch heads length dim", heads=self.num_heads)
            for proj in self.projections()
        )
        return query, key, value

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, {self.pattern}"
