"""LSGAttention: multi-head self-attention with an LSG pattern, a drop-in for a dense attention layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import integer, probability, type_name
from .compression import lsh_directions
from .dispatch import Answer, answered_by, check_implementation
from .functional import lsg_attention
from .pattern import LSGPattern
from .shards import first_head_of
from .varlen import lsg_attention_varlen

if TYPE_CHECKING:
    from typing_extensions import Self


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
        device, dtype: of the parameters, as in :class:`torch.nn.Linear`.

    Tensor parallelism shares the heads out: ``ColwiseParallel`` for the three projections in, ``RowwiseParallel`` for
    ``out_proj``, of ``torch.distributed.tensor.parallel``. The number of processes must divide that of heads.

    Raises:
        TypeError: an argument does not have the type named above.
        ValueError: a number is out of range, ``embed_dim`` is not a multiple of ``num_heads``, or there is no such
            implementation.
    """

    answers: Answer | None = None  # what its calls are answered by; see lsg_attn.models.parallelize

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: LSGPattern | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        implementation: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
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
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.v_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)

    @classmethod
    def from_multihead(
        cls, multihead: nn.MultiheadAttention, pattern: LSGPattern | None = None, *, implementation: str = "auto"
    ) -> Self:
        """A layer with copies of the weights of a :class:`torch.nn.MultiheadAttention`, on its device.

        The layer takes (batch, length, embed_dim), whatever ``multihead.batch_first`` is.

        Raises:
            TypeError: ``multihead`` is of another type, or see the constructor.
            ValueError: it has keys or values of another width, ``add_bias_kv`` or ``add_zero_attn``.
        """
        if not isinstance(multihead, nn.MultiheadAttention):
            raise TypeError(f"multihead: expected a torch.nn.MultiheadAttention, got {type_name(multihead)}")
        weight, bias = multihead.in_proj_weight, multihead.in_proj_bias
        for name, is_there in (
            ("kdim or vdim other than embed_dim", weight is None),
            ("add_bias_kv", multihead.bias_k is not None),
            ("add_zero_attn", multihead.add_zero_attn),
        ):
            if is_there:
                raise ValueError(f"multihead: expected none with {name}, which LSG attention does not have")
        layer = cls(
            multihead.embed_dim, multihead.num_heads, pattern, dropout=multihead.dropout, bias=bias is not None,
            implementation=implementation, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        with torch.no_grad():
            for projection, w, b in zip(layer.projections(), weight.detach().chunk(3), biases, strict=True):
                projection.load_state_dict({"weight": w} if b is None else {"weight": w, "bias": b})
            layer.out_proj.load_state_dict(multihead.out_proj.state_dict())
        return layer.train(multihead.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within each sequence.

        Args:
            hidden_states: (batch, G+T, embed_dim), global positions first; or (total, embed_dim), the rows of packed
                sequences, each with its global positions first.
            attention_mask: (batch, G+T) or (batch, T), as in :func:`lsg_attn.lsg_attention`; None for packed sequences.
            cu_seqlens, max_seqlen: of packed sequences, as in :func:`lsg_attn.lsg_attention_varlen`.

        Returns:
            Of the input's shape and dtype.

        Raises:
            TypeError: ``hidden_states`` is not a tensor.
            ValueError: ``hidden_states`` has the wrong shape, is on another device than the parameters or, except under
                autocast, has another dtype; the mask or the lengths do not fit; the implementation cannot run; or
                tensor parallelism does not share out whole heads.
        """
        projected: Tensor = self.out_proj(
            self.attend(hidden_states, attention_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        )
        return projected

    def attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """:meth:`forward` without its last projection."""
        is_packed = cu_seqlens is not None
        self._check_input(hidden_states, is_packed)
        first_head = first_head_of(self.projections()[0], self.num_heads)
        query, key, value = self.project(hidden_states.unsqueeze(0) if is_packed else hidden_states)
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "implementation": self.implementation,
            "first_head": first_head,
            "lsh_projections": None if first_head is None else self._directions(first_head, query),
        }
        if cu_seqlens is None:
            if max_seqlen is not None:
                raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen}")
            attend = lsg_attention if self.answers is None else answered_by(self.answers)(lsg_attention)
            out: Tensor = attend(query, key, value, self.pattern, attention_mask, **options)
            return out.transpose(1, 2).flatten(2)
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None with cu_seqlens, as packed sequences have no padding")
        if max_seqlen is None:
            raise ValueError("max_seqlen: expected an int with cu_seqlens, got None")
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = lsg_attention_varlen(query, key, value, cu_seqlens, max_seqlen, self.pattern, **options)
        return out.flatten(1)

    def _check_input(self, x: Tensor, is_packed: bool) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"hidden_states: expected a torch.Tensor, got {type_name(x)}")
        rows = "(total, " if is_packed else "(batch, G+T, "
        if x.dim() != rows.count(",") + 1 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"hidden_states: expected shape {rows}{self.embed_dim}), got {tuple(x.shape)}")
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

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.embed_dim // self.num_heads

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, heads, G+T, head_dim) of hidden_states (batch, G+T, embed_dim).

        The heads are all or, with tensor parallelism, those of this process.
        """
        query, key, value = (
            rearrange(proj(hidden_states), "batch length (heads dim) -> batch heads length dim", dim=self.head_dim)
            for proj in self.projections()
        )
        if not query.shape[1] == key.shape[1] == value.shape[1]:
            raise ValueError(
                "expected the projections of queries, keys and values to give as many heads each, "
                f"got {query.shape[1]}, {key.shape[1]} and {value.shape[1]}: parallelize all three alike"
            )
        return query, key, value

    def _directions(self, first_head: int, query: Tensor) -> list[Tensor] | None:
        """The directions of ``lsh`` for this process's heads, those that the same heads have in one process."""
        if not self.pattern.rule.is_hashed:
            return None
        own = slice(first_head, first_head + query.shape[1])
        return [x[own].to(query.device) for x in lsh_directions(self.pattern, self.num_heads, self.head_dim)]

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, {self.pattern}"
