"""LSGAttention: multi-head self-attention with an LSG pattern, a drop-in for a dense attention layer."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import check_implementation, lsg_attention
from .pattern import LSGPattern


class LSGAttention(nn.Module):
    """Multi-head self-attention whose first G positions are global and the rest see an LSG window.

    Parameters are named as in BART (``q_proj k_proj v_proj out_proj``), so its checkpoints fit.

    Args:
        embed_dim: width of the input and output; a multiple of ``num_heads``.
        num_heads: attention heads, of ``embed_dim // num_heads`` each.
        pattern: who sees whom; by default ``LSGPattern()``.
        dropout: probability, in [0, 1), that an attention probability is zeroed in training.
        bias: whether the projections have a bias.
        implementation: as in :func:`lsg_attn.lsg_attention`.

    Raises:
        TypeError: a size is not an int, or ``pattern`` is not an LSGPattern.
        ValueError: a size is out of range or ``embed_dim`` is not a multiple of ``num_heads``.
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
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")
            if value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if pattern is not None and not isinstance(pattern, LSGPattern):
            raise TypeError(f"pattern: expected an LSGPattern, got {type(pattern).__name__}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        check_implementation(implementation)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.pattern = LSGPattern() if pattern is None else pattern
        self.dropout = dropout
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
            ValueError: ``hidden_states`` has another shape, or the mask does not fit.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.embed_dim:
            raise ValueError(
                f"hidden_states: expected shape (batch, G+T, {self.embed_dim}), got {tuple(hidden_states.shape)}"
            )
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
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, num_heads, G+T, head_dim) of hidden_states (batch, G+T, embed_dim)."""
        query, key, value = (
            proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, {self.pattern}"
