"""The compressions: which tokens become the sparse keys, and with what weight.

Every type is a linear map that sends a token to at most one slot, ``sk[n] = sum over t with slot(t) = n of
w(t) k[t]``, and ``sv`` from v by the same map. So its transpose is a gather, ``dk[t] += w(t) dsk[slot(t)]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .call import Call
from .pattern import LSGPattern
from .tracing import is_exporting
from .workspace import Workspace

# Added to the counts that means are divided by, as in the original: an empty slot then gives 0.
_POOLING_EPS = 1e-6
_LSH_EPS = 1e-8


class Compression:
    """A map from T tokens to N slots, for each batch and head; of a part of them, all shapes lack the batch.

    Attributes:
        slot: (batch, heads, T) int64, the token's slot; 0 with weight 0 where it has none.
        weight: (batch, heads, T) float32 or float64, the token's weight in its slot.
        keep: (batch, heads, N) bool, whether the slot may be seen.
        token: (batch, heads, N) int64, the slot's only token where the map is a choice, else None. In the last block
            it can be T or more, past the end; such a slot is not kept.
    """

    slot: Tensor
    weight: Tensor
    keep: Tensor
    token: Tensor | None

    def part(self, batch: int, heads: slice) -> Compression:
        """The map of some heads of one batch entry."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """Compress x (..., T, head_dim) to (..., N, head_dim), summed in the weights' dtype, returned in x's."""
        weighted = x * self.weight.unsqueeze(-1)
        sums = weighted.new_zeros(*weighted.shape[:-2], self.keep.shape[-1], x.shape[-1])
        return sum_rows(weighted, self.slot, sums).to(x.dtype)

    def transpose(self, dx: Tensor) -> Tensor:
        """The gradient (..., T, head_dim) of :meth:`apply`'s input, given that of its output (..., N, head_dim)."""
        return dx.gather(-2, _rows(self.slot, dx)) * self.weight.unsqueeze(-1)

    def weight_gradient(self, x: Tensor, dx: Tensor) -> Tensor:
        """The gradient (..., T) of the weights through :meth:`apply` of x, given that of its output."""
        return (dx.gather(-2, _rows(self.slot, x)) * x).sum(-1)

    def softmax_backward(self, dweight: Tensor) -> Tensor:
        """Take (..., T) gradients of weights that are a softmax over each slot to those of its scores."""
        product = self.weight * dweight
        total = torch.zeros_like(self.keep, dtype=product.dtype).scatter_add(-1, self.slot, product)
        return product - self.weight * total.gather(-1, self.slot)


@dataclass(frozen=True)
class Sums(Compression):
    """A map that gives each token its slot and weight there."""

    slot: Tensor
    weight: Tensor
    keep: Tensor
    token: None = None

    def part(self, batch: int, heads: slice) -> Sums:
        """The map of some heads of one batch entry."""
        return Sums(self.slot[batch, heads], self.weight[batch, heads], self.keep[batch, heads])


@dataclass(frozen=True)
class Choice(Compression):
    """A map that gives each slot its token; ``length``: T, ``dtype``: of weights. The rest is made where asked for."""

    token: Tensor
    keep: Tensor
    length: int
    dtype: torch.dtype

    def part(self, batch: int, heads: slice) -> Choice:
        """The map of some heads of one batch entry."""
        return Choice(self.token[batch, heads], self.keep[batch, heads], self.length, self.dtype)

    @cached_property
    def slot(self) -> Tensor:  # type: ignore[override]
        """See :class:`Compression`."""
        slots = torch.arange(self.token.shape[-1], device=self.token.device)
        return self._of_tokens(slots.expand_as(self.token))

    @cached_property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See :class:`Compression`."""
        return self._of_tokens(self.keep.to(self.dtype))

    def _of_tokens(self, x: Tensor) -> Tensor:
        """Bring x (..., N) to the slots' tokens; of the others, 0."""
        out = x.new_zeros(*x.shape[:-1], self.length + 1)  # the last place is for what lies past the end
        return _without_padding(out.scatter_(-1, self.token.clamp(max=self.length), x), self.length)


@dataclass(frozen=True)
class Tokens:
    """What a compression may look at: the T tokens after the globals.

    ``query``: (batch, heads, T, head_dim); ``key``: (batch, key heads, T, head_dim), of which each serves as many heads
    of the query; ``keep``: (batch, T) bool; ``scale`` of the scores; ``projections``: see :func:`lsh_directions`;
    ``first_head``: see :class:`.call.Call`.
    """

    query: Tensor
    key: Tensor
    keep: Tensor
    scale: float
    projections: Sequence[Tensor] | None = None
    first_head: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, T)."""
        batch, heads, length, _ = self.query.shape
        return batch, heads, length

    @property
    def group(self) -> int:
        """The heads of the query for each head of the key."""
        return self.query.shape[1] // self.key.shape[1]

    def head_numbers(self) -> Tensor:
        """(heads, 1) int64: the number of each head."""
        numbers = torch.arange(self.first_head, self.first_head + self.shape[1], device=self.key.device)
        return numbers.unsqueeze(-1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that norms, weights and sums are computed in."""
        return torch.promote_types(self.key.dtype, torch.float32)


def compress(pattern: LSGPattern, tokens: Tokens) -> Compression | None:
    """The compression that ``pattern`` asks for, or None where no query sees a compressed key."""
    if not pattern.has_sparse or slots_of(pattern, tokens.shape[-1]) == 0:
        return None
    return _COMPRESSIONS[pattern.compression](pattern, tokens)


def slots_of(pattern: LSGPattern, num_tokens: int) -> int:
    """The slots of T tokens: :meth:`.LSGPattern.num_slots`, or in a graph for any T, those of :func:`_blocks_of`."""
    if is_exporting():
        return _blocks_of(pattern, num_tokens) * pattern.step
    return pattern.num_slots(num_tokens)


def _blocks_of(pattern: LSGPattern, num_tokens: int) -> int:
    """The blocks that T tokens are filled up to: as few as can be; in a graph for any T, at least two.

    A graph for a single block would not do for more. The slots of a block of padding are not kept; and where T <= 2B no
    query sees any.
    """
    if is_exporting():
        return num_tokens // pattern.block_size + 2
    return pattern.num_blocks(num_tokens)


def compress_call(call: Call) -> Compression | None:
    """The compression of a call's keys, or None where no query sees a compressed key."""
    return compress(call.pattern, tokens_of(call))


def tokens_of(call: Call) -> Tokens:
    """What the compression of a call may look at."""
    first = call.pattern.num_global_tokens
    query, key = call.query[:, :, first:], call.key[:, :, first:]
    return Tokens(query, key, call.keep()[:, first:], call.scale, call.projections or None, call.first_head)


def bos_pooling_backward(
    compression: Compression, bos_query: Tensor, key: Tensor, value: Tensor, dkey_slots: Tensor, dvalue_slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the weights of ``bos_pooling`` add to the gradients of the first token's query and of all keys.

    ``bos_query``: (heads, head_dim); ``key, value``: (heads, T, head_dim); ``dkey_slots, dvalue_slots``: the gradients
    of compressed keys and values, (heads, N, head_dim). Returns gradients shaped as bos_query and key.
    """
    dweight = compression.weight_gradient(key, dkey_slots) + compression.weight_gradient(value, dvalue_slots)
    dscores = scale * compression.softmax_backward(dweight).unsqueeze(-1)
    return (dscores * key).sum(-2), dscores * bos_query.unsqueeze(-2)


def lsh_directions(pattern: LSGPattern, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """The random directions of each hashing round, normal(0, 1) from ``pattern.lsh_seed``.

    Returns:
        One float32 CPU tensor (heads, head_dim, buckets // 2) for each of ``pattern.lsh_buckets``.
    """
    return _draw_directions(pattern.lsh_seed, heads, head_dim, pattern.lsh_buckets)


@lru_cache(maxsize=32)
def _draw_directions(seed: int, heads: int, head_dim: int, buckets: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator("cpu").manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    with _disable_current_modes():  # while a graph is traced, too, these are numbers: constants of the graph
        return tuple(torch.randn(heads, head_dim, m // 2, **options) for m in buckets)


def _identity(pattern: LSGPattern, tokens: Tokens) -> Compression:
    return _choice(pattern, tokens, torch.arange(slots_of(pattern, tokens.shape[-1]), device=tokens.key.device))


def _stride(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """Head h takes tokens n f + (h mod f)."""
    slot = torch.arange(slots_of(pattern, tokens.shape[-1]), device=tokens.key.device)
    return _choice(pattern, tokens, slot * pattern.sparsity_factor + tokens.head_numbers() % pattern.sparsity_factor)


def _block_stride(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """Head h takes, in each block, the ``step`` tokens at offsets (h step + j) mod B."""
    slot = torch.arange(slots_of(pattern, tokens.shape[-1]), device=tokens.key.device)
    block, offset = slot // pattern.step, slot % pattern.step
    offset = (tokens.head_numbers() * pattern.step + offset) % pattern.block_size
    return _choice(pattern, tokens, block * pattern.block_size + offset)


def _norm(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """In each chunk of c tokens, the c/f kept ones of largest L2 key norm, in ascending order of norm.

    The order matters only where a window cuts a chunk. Of equal norms the earlier token goes first.
    """
    norms = tokens.key.new_empty(tokens.key.shape[:-1], dtype=tokens.dtype)
    for part in _parts(tokens.key):
        torch.linalg.vector_norm(tokens.key[part].detach(), dim=-1, dtype=tokens.dtype, out=norms[part])
    norms = norms.masked_fill(~tokens.keep.unsqueeze(1), -1.0)  # below every kept token, also one of norm 0
    norms = _in_pieces(pattern, pattern.chunk, norms, -1.0)
    count = pattern.chunk // pattern.sparsity_factor
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK takes the earlier of equals
        chosen = norms.topk(count).indices
    else:
        chosen = norms.argsort(dim=-1, descending=True, stable=True)[..., :count]
    first = torch.arange(norms.shape[-2], device=norms.device) * pattern.chunk
    token = (chosen.flip(-1) + first.unsqueeze(-1)).flatten(-2)
    return _choice(pattern, tokens, token if tokens.group == 1 else token.repeat_interleave(tokens.group, 1))


def _pooling(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """The mean of the kept tokens of each group of f."""
    slot = _group_of(pattern, tokens)
    return _mean(tokens, slot, slots_of(pattern, tokens.shape[-1]), _POOLING_EPS)


def _bos_pooling(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """A softmax in each group of f over the scores of the first token's query, whether that is padding or not."""
    bos = tokens.query[:, :, 0].unflatten(1, (-1, tokens.group)).mT  # (batch, key heads, head_dim, group)
    scores = (tokens.key @ bos).mT.flatten(1, 2).to(tokens.dtype) * tokens.scale  # (batch, heads, T)
    keep = _in_pieces(pattern, pattern.sparsity_factor, tokens.keep.unsqueeze(1), False)
    scores = _in_pieces(pattern, pattern.sparsity_factor, scores, 0.0)
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)  # finite: a group of padding is not NaN
    weight = (scores.softmax(dim=-1) * keep).flatten(-2)
    batch, heads, length = tokens.shape
    return Sums(
        slot=_group_of(pattern, tokens).expand(batch, heads, length),
        weight=_without_padding(weight, length),
        keep=keep.any(-1).expand(batch, heads, -1),
    )


def _lsh(pattern: LSGPattern, tokens: Tokens) -> Compression:
    """In each chunk of c tokens, c/f clusters of keys that fall into the same hash bucket, each its mean.

    A round sends a row x to the argmax of [p, -p], p its products with random directions; rows of a bucket are
    summed and go on to the next round. A row's length does not move the argmax, so it is not normalised first.
    """
    directions = directions_of(pattern, tokens)
    slot = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.key.device)
    scratch = Workspace(tokens.key, tokens.dtype)
    has_padding = [is_exporting() or not keep.all() for keep in tokens.keep]
    key_head = torch.arange(tokens.shape[1]) // tokens.group
    for part in _parts(slot):
        entry, chosen = part
        x = tokens.key[part] if tokens.group == 1 else tokens.key[entry, key_head[chosen]]
        x = x.detach().to(tokens.dtype)
        if has_padding[entry]:
            x = x.masked_fill(~tokens.keep[entry].unsqueeze(-1), 0)
        slot[part] = _clusters(pattern, x, [direction[chosen] for direction in directions], scratch)
    return mean_of_clusters(pattern, tokens, slot)


def directions_of(pattern: LSGPattern, tokens: Tokens) -> list[Tensor]:
    """The directions of each hashing round, in the dtype of weights: those of the call, or else of the seed."""
    directions = tokens.projections
    if directions is None:
        directions = lsh_directions(pattern, tokens.shape[1], tokens.key.shape[-1])
    return [direction.detach().to(tokens.key.device, tokens.dtype) for direction in directions]


def mean_of_clusters(pattern: LSGPattern, tokens: Tokens, slot: Tensor) -> Compression:
    """The map of ``lsh``, given each token's slot (batch, heads, T) int64."""
    return _mean(tokens, slot, slots_of(pattern, tokens.shape[-1]), _LSH_EPS)


def _clusters(pattern: LSGPattern, x: Tensor, directions: Sequence[Tensor], scratch: Workspace) -> Tensor:
    """The slot (heads, T) of each token of x (heads, T, head_dim), of which padding is 0."""
    length, buckets = x.shape[1], pattern.lsh_buckets
    x = _in_pieces(pattern, pattern.chunk, x.mT, 0.0).movedim(1, -1)  # (heads, chunks, c, head_dim)
    cluster = torch.arange(pattern.chunk, device=x.device).expand(x.shape[:-1])
    for i, (m, direction) in enumerate(zip(buckets, directions, strict=True)):
        bucket = _hash(x, direction, scratch)
        cluster = bucket.gather(-1, cluster)
        if i + 1 < len(buckets):
            sums = scratch.empty(f"sums {i % 2}", *x.shape[:-2], m, x.shape[-1])  # x may lie in the other one
            x = sum_rows(x, bucket, sums.zero_())
    first = torch.arange(cluster.shape[-2], device=x.device) * buckets[-1]
    return _without_padding((cluster + first.unsqueeze(-1)).flatten(-2), length)


def _hash(x: Tensor, direction: Tensor, scratch: Workspace) -> Tensor:
    """The bucket (heads, chunks, c) of each row of x (heads, chunks, c, head_dim), given its heads' directions.

    That is the argmax of [p, -p], where p is x times direction (heads, head_dim, m//2).
    """
    half = direction.shape[-1]
    if half == 0:  # a single bucket
        return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    if is_exporting():
        products = x @ direction.unsqueeze(1)
        magnitudes = products.abs()
    else:
        products = scratch.matmul("products", x.flatten(1, 2), direction).view(*x.shape[:-1], half)
        magnitudes = torch.abs(products, out=scratch.empty("magnitudes", *products.shape))
    largest = magnitudes.max(-1, keepdim=True).indices  # faster than argmax
    return (largest + half * (products.gather(-1, largest) < 0)).squeeze(-1)


def _parts(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Go over batch entries and heads of x: on a CPU a head for each thread at a time, so that it stays in cache."""
    batch, heads = x.shape[:2]
    step = torch.get_num_threads() if x.device.type == "cpu" else heads
    for entry in range(batch):
        for start in range(0, heads, step):
            yield entry, slice(start, start + step)


def _choice(pattern: LSGPattern, tokens: Tokens, token: Tensor) -> Compression:
    """The map that copies the tokens ``token``, (..., N) broadcastable to (batch, heads, N), into their slots."""
    batch, heads, length = tokens.shape
    keep = _pad_to_blocks(pattern, tokens.keep, False)
    token = token.expand(batch, heads, -1)
    keep = keep.unsqueeze(1).expand(batch, heads, keep.shape[-1]).gather(-1, token)
    return Choice(token, keep, length, tokens.dtype)


def _mean(tokens: Tokens, slot: Tensor, num_slots: int, eps: float) -> Compression:
    """The map that averages the kept tokens of each slot; slot: broadcastable to (batch, heads, T)."""
    batch, heads, length = tokens.shape
    slot = slot.expand(batch, heads, length)
    keep = tokens.keep.unsqueeze(1).to(tokens.dtype).expand(batch, heads, length)
    count = keep.new_zeros(batch, heads, num_slots).scatter_add_(-1, slot, keep)
    # eps again as the least: an optimizer of ONNX graphs leaves out the sum, as if eps were 0
    return Sums(slot, keep / (count.gather(-1, slot) + eps).clamp(min=eps), count > 0)


def _group_of(pattern: LSGPattern, tokens: Tokens) -> Tensor:
    return torch.arange(tokens.shape[-1], device=tokens.key.device) // pattern.sparsity_factor


def _pad_to_blocks(pattern: LSGPattern, x: Tensor, value: float) -> Tensor:
    """Fill the last dimension, T tokens, up to whole blocks."""
    missing = _blocks_of(pattern, x.shape[-1]) * pattern.block_size - x.shape[-1]
    if not is_exporting() and not missing:  # a graph may be for any length
        return x
    return torch.nn.functional.pad(x, (0, missing), value=value)


def _without_padding(x: Tensor, length: int) -> Tensor:
    """The first ``length`` columns of x. Cut by a pad, whose result has that length in a graph without a proof."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1])) if is_exporting() else x[..., :length]


def _in_pieces(pattern: LSGPattern, size: int, x: Tensor, value: float) -> Tensor:
    """The tokens (..., T), filled up to whole blocks, in pieces (..., n, size) of blocks."""
    return _pad_to_blocks(pattern, x, value).unfold(-1, size, size)


def sum_rows(x: Tensor, slot: Tensor, out: Tensor) -> Tensor:
    """Add the rows of x (..., rows, head_dim) to the slots that they go to in out (..., slots, head_dim), contiguous.

    ``slot``: (..., rows), broadcastable. One flat ``index_add_`` is several times faster than ``scatter_add_`` here.
    """
    if is_exporting():  # the sizes of flat rows would be more than a graph for any T can tell
        return out.scatter_add_(-2, _rows(slot, x), x)
    leading, (num_slots, head_dim) = out.shape[:-2], out.shape[-2:]
    count = math.prod(leading)
    first = torch.arange(count, device=x.device).view(*leading, 1) * num_slots
    index = (slot + first).flatten()
    out.view(-1, head_dim).index_add_(0, index, x.reshape(-1, head_dim))
    return out


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """An index of rows (..., n) as gather and scatter want it for x (..., rows, head_dim)."""
    return index.unsqueeze(-1).expand(*x.shape[:-2], index.shape[-1], x.shape[-1])


_COMPRESSIONS: dict[str, Callable[[LSGPattern, Tokens], Compression]] = {
    "identity": _identity,
    "norm": _norm,
    "pooling": _pooling,
    "bos_pooling": _bos_pooling,
    "stride": _stride,
    "block_stride": _block_stride,
    "lsh": _lsh,
}
