"""The sweep of the block-wise implementation: over a few heads at a time, and over tiles of their query blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..call import Call
from ..compression import Compression, bos_pooling_backward, sum_rows
from ..workspace import Workspace
from .layout import Layout, Windows

# Scores computed at a time: for each thread of a CPU, as many as its own cache holds about once; a GPU wants more work
# in each launch.
_CPU_SCORES, _GPU_SCORES = 1 << 19, 1 << 25
# Queries that see all and are taken at a time with dropout: as many whatever the length is, as draws go by them.
_DRAWN_ROWS = 8
# Whether oneDNN has products of a dtype for this processor. Without them, PyTorch's take up to 70 times as long.
_SUPPORTS_PRODUCTS_OF: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


@dataclass(frozen=True)
class Part:
    """Some heads of one batch entry; all that read one key head, where the keys have fewer heads.

    ``query, key, value``: (heads, G+T, head_dim), views of the call's, a key head for each head of the query;
    ``key_heads``: those of the call's keys; ``slots``: (2, heads, N, head_dim), compressed
    keys and values, or None; ``keep``: of each source of keys, which rows are visible, (1, G+T) and (heads, N) bool.
    """

    batch: int
    heads: slice
    key_heads: slice
    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor | None
    keep: dict[str, Tensor]
    compression: Compression | None

    def of(self, x: Tensor) -> Tensor:
        """The part (heads, G+T, ...) of x (batch, heads, G+T, ...)."""
        return x[self.batch, self.heads]

    @cached_property
    def hidden(self) -> dict[str, tuple[int, int]]:
        """Of each source of keys, the rows [start, stop) that have all that are not visible."""
        return {name: _span_of(~keep.all(0)) for name, keep in self.keep.items()}


@dataclass(frozen=True)
class Tile:
    """Queries [start, stop) of each head, in blocks of ``size`` rows that each see one window of keys.

    ``key, value``: (heads * blocks, window, head_dim). ``windows`` is None where the one block's window is the whole
    sequence. ``visible``: (heads or 1, blocks, window) bool, or None if all keys are visible. ``later``: (size,
    columns) bool, which of the window's last columns come later than each query; None unless the pattern is causal.
    """

    start: int
    stop: int
    size: int
    windows: Windows | None
    key: Tensor
    value: Tensor
    visible: Tensor | None
    later: Tensor | None

    def load(self, x: Tensor, out: Tensor) -> Tensor:
        """Copy the tile's queries of x (heads, G+T, width) to out (heads, queries, width), in its dtype.

        Returns:
            out as (heads * blocks, size, width).
        """
        out.copy_(x[:, self.start : self.stop])
        return out.view(-1, self.size, out.shape[-1])

    def store(self, x: Tensor, out: Tensor) -> None:
        """The reverse of :meth:`load`: write x to the tile's queries of out (heads, G+T, width)."""
        out[:, self.start : self.stop] = x.view(out.shape[0], -1, out.shape[-1])

    def hide(self, x: Tensor, value: float) -> None:
        """Fill x (heads * blocks, size, window) with ``value`` where a key is not visible to a query."""
        if self.visible is not None:
            blocks = x.view(-1, self.visible.shape[1], *x.shape[1:])  # (heads, blocks, size, window)
            blocks.masked_fill_(~self.visible.unsqueeze(2), value)
        if self.later is not None:
            x[..., -self.later.shape[1] :].masked_fill_(self.later, value)

    def scatter_add(self, dwindow: Tensor, drows: dict[str, Tensor]) -> None:
        """Add gradients (2, *key.shape) of keys and values to those of the rows their windows were copied from."""
        if self.windows is None:
            drows["sequence"] += dwindow.flatten(0, 1)
        else:
            shape = (-1, self.windows.blocks, *self.key.shape[1:])
            self.windows.scatter_add(drows, dwindow.view(shape))


class Sweep:
    """The order in which forward and backward go over parts and tiles, and the memory that they use again.

    ``threads``: of the CPU, to share heads out over; ``dtype``: of products. The same arguments give the same order.
    """

    # Elements of keys whose heads are taken together: slots and gradients of a part are kept in memory of their own.
    part_elements = 1 << 23

    def __init__(
        self, call: Call, compression: Compression | None, threads: int, dtype: torch.dtype | None = None
    ) -> None:
        self.call, self.compression, self.keep = call, compression, call.keep()
        query, pattern = call.query, call.pattern
        self.layout = layout = Layout(pattern, query.shape[-2], call.section)
        self.work = Workspace(query, dtype or dtype_of_products(query))
        self.sum_dtype = torch.promote_types(query.dtype, torch.float32)
        _, heads, length, head_dim = query.shape
        on_cpu = query.device.type == "cpu"
        self.budget = threads * _CPU_SCORES if on_cpu else _GPU_SCORES
        turns = max(self.part_elements // max(length * head_dim * threads, 1), 1)
        self.group = heads // call.key.shape[1]
        self.head_spans = list(_spans(0, heads, turns * threads if self.group == 1 else self.group))
        self.scores_of_block = max(pattern.block_size * layout.largest_window, 1)  # in each head

    def parts(self) -> Iterator[Part]:
        """Go over the batch, and over some heads at a time."""
        call = self.call
        for entry in range(call.query.shape[0]):
            for chosen in itertools.starmap(slice, self.head_spans):
                compression = None if self.compression is None else self.compression.part(entry, chosen)
                key_heads = slice(chosen.start // self.group, chosen.stop // self.group)
                query = call.query[entry, chosen]
                key, value = (x[entry, key_heads].expand(query.shape) for x in (call.key, call.value))
                slots, keep = None, {"sequence": self.keep[entry : entry + 1]}
                if compression is not None:
                    slots = self._compress(key, value, compression)
                    keep["slots"] = compression.keep
                yield Part(entry, chosen, key_heads, query, key, value, slots, keep, compression)

    def tiles(self, part: Part) -> Iterator[Tile]:
        """Go over the part's queries: first those that see the whole sequence, then the blocks."""
        heads, length, head_dim = part.query.shape
        layout, work = self.layout, self.work
        if layout.dense:
            key, value = self._whole("key", part.key), self._whole("value", part.value)
        at_once = _DRAWN_ROWS if self.call.dropout_p else self.budget // max(heads * length, 1)
        for dense in layout.dense:
            visible = None if part.hidden["sequence"] == (0, 0) else part.keep["sequence"][None]
            if dense.first_key:
                visible = part.keep["sequence"][None] & (torch.arange(length, device=key.device) >= dense.first_key)
            for start, stop in _spans(dense.start, dense.stop, at_once):
                yield Tile(start, stop, stop - start, None, key, value, visible, self._later(start, stop))
        later = self._later_in_block()
        for first, end in layout.spans(self.budget // (heads * self.scores_of_block)):
            windows = layout.windows(first, end)
            start, stop = layout.queries(first, end)
            size = (stop - start) // windows.blocks
            window = work.empty("window", 2, heads, windows.blocks, windows.size, head_dim)
            for i, rows in enumerate((part.key, part.value)):
                windows.gather({"sequence": rows} | ({} if part.slots is None else {"slots": part.slots[i]}), window[i])
            key, value = window.flatten(1, 2)
            visible = self._visible(part, windows)
            yield Tile(start, stop, size, windows, key, value, visible, None if later is None else later[:size, :size])

    def load(self, tile: Tile, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tile's queries (heads * blocks, size, width) of x (heads, G+T, width), in the memory ``name``."""
        return tile.load(x, self.work.empty(name, x.shape[0], tile.stop - tile.start, x.shape[2], dtype=dtype))

    def gradients_of_rows(self, part: Part, groups: int = 1) -> dict[str, Tensor]:
        """Zeros (groups, 2, heads, rows, head_dim) for gradients of keys and values: of the sequence and the slots."""
        heads, length, head_dim = part.key.shape
        shapes = {"sequence": length} | ({} if part.slots is None else {"slots": part.slots.shape[2]})
        return {
            name: self.work.empty(f"d{name}", groups, 2, heads, rows, head_dim, dtype=self.sum_dtype).zero_()
            for name, rows in shapes.items()
        }

    def clear(self, dquery: Tensor) -> None:
        """Zero a part's gradient (heads, G+T, head_dim) of tokens that are no queries."""
        if (section := self.call.section) is not None:
            tokens = dquery[:, self.call.pattern.num_global_tokens :]
            tokens[:, : section.start].zero_()
            tokens[:, section.stop :].zero_()

    def finish(self, part: Part, drows: dict[str, Tensor], dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> None:
        """Bring a part's gradients of compressed keys back to the tokens, and store those of keys and values."""
        compression, heads, first = part.compression, part.query.shape[0], self.call.pattern.num_global_tokens
        sequence = drows["sequence"]
        if compression is not None:
            dkey_slots, dvalue_slots = drows["slots"].unflatten(0, (2, heads))
            dkey_tokens, dvalue_tokens = sequence[:, first:].unflatten(0, (2, heads))
            if self.call.rule.has_weight_gradient:
                hidden = ~part.keep["sequence"][:, first:, None]
                key, value = (x[:, first:].masked_fill(hidden, 0) for x in (part.key, part.value))
                dbos, dkey_weights = bos_pooling_backward(
                    compression, part.query[:, first], key, value, dkey_slots, dvalue_slots, self.call.scale
                )
                part.of(dquery)[:, first] += dbos
                dkey_tokens += dkey_weights
            if compression.token is not None:
                index = self._flat(compression.token, sequence.shape[1], 2)
                sequence.flatten(0, 1).index_add_(0, index, drows["slots"].flatten(0, 1))
            else:
                dkey_tokens += compression.transpose(dkey_slots)
                dvalue_tokens += compression.transpose(dvalue_slots)
        for grad, rows in zip((dkey, dvalue), sequence.split(heads), strict=True):
            rows = rows if self.group == 1 else rows.sum(0, keepdim=True)
            grad[part.batch, part.key_heads].copy_(rows)

    def _whole(self, name: str, x: Tensor) -> Tensor:
        """x (heads, G+T, head_dim) in the dtype of products."""
        dtype = self.work.dtype
        return x if x.dtype == dtype else self.work.empty(f"whole {name}", *x.shape).copy_(x)

    def _visible(self, part: Part, windows: Windows) -> Tensor | None:
        """(heads, blocks, window) bool, or None where all is visible."""
        if not any(windows.meet(name, *span) for name, span in part.hidden.items()):
            return None
        heads = part.query.shape[0]
        keep = {name: x[..., None].expand(heads, -1, 1) for name, x in part.keep.items()}
        visible = self.keep.new_empty(heads, windows.blocks, windows.size, 1)
        visible = windows.gather(keep, visible)[..., 0]
        return None if visible.all() else visible

    def _later(self, start: int, stop: int) -> Tensor | None:
        """(stop - start, G+T) bool: which positions are tokens later than each position from ``start`` to ``stop``."""
        if not self.call.pattern.causal:
            return None
        index = torch.arange(self.layout.length, device=self.keep.device)
        return (index >= self.call.pattern.num_global_tokens) & (index > index[start:stop, None])

    def _later_in_block(self) -> Tensor | None:
        """(B, B) bool: which tokens of a block, the last of its window, are later than each token of the block."""
        if not self.call.pattern.causal:
            return None
        index = torch.arange(min(self.call.pattern.block_size, self.layout.length), device=self.keep.device)
        return index > index[:, None]

    def _compress(self, key: Tensor, value: Tensor, compression: Compression) -> Tensor:
        """The slots (2, heads, N, head_dim) of keys and of values (heads, G+T, head_dim)."""
        heads, length, head_dim = key.shape
        slots = self.work.empty("slots", 2, heads, self.layout.num_slots, head_dim, dtype=key.dtype)
        first = self.call.pattern.num_global_tokens
        positions = None if compression.token is None else self._position(compression.token, length)
        for x, out in zip((key, value), slots, strict=True):
            if positions is not None:
                for rows, index, chosen in zip(x, positions, out, strict=True):  # x as it is: to flatten it may copy
                    torch.index_select(rows, 0, index, out=chosen)
            else:
                self.sum_slots(x[:, first:], compression, out)
        return slots

    def sum_slots(self, x: Tensor, compression: Compression, out: Tensor) -> None:
        """Write to out (heads, N, head_dim) the sums that a compression makes of x (heads, T, head_dim)."""
        for start, stop in _spans(0, x.shape[0], torch.get_num_threads()):
            weighted = self.work.empty("weighted", stop - start, *x.shape[1:], dtype=self.sum_dtype)
            torch.mul(x[start:stop], compression.weight[start:stop, :, None], out=weighted)
            sums = self.work.empty("sums", stop - start, *out.shape[1:], dtype=self.sum_dtype)
            out[start:stop] = sum_rows(weighted, compression.slot[start:stop], sums.zero_())

    def _flat(self, token: Tensor, length: int, copies: int) -> Tensor:
        """Where the tokens (heads, N) are among the rows of ``copies`` times (heads, length); of none, some row."""
        heads = token.shape[0]
        first = torch.arange(copies * heads, device=token.device).view(copies, heads, 1) * length
        return (first + self._position(token, length)).flatten()

    def _position(self, token: Tensor, length: int) -> Tensor:
        """The rows of tokens; of one past the end, whose slot is not kept, the last."""
        return (token + self.call.pattern.num_global_tokens).clamp(max=length - 1)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of the products of x: float32 where a CPU has no fast ones of x's own."""
    if x.device.type != "cpu" or x.dtype not in _SUPPORTS_PRODUCTS_OF:
        return x.dtype
    is_fast = torch.backends.mkldnn.is_available() and _SUPPORTS_PRODUCTS_OF[x.dtype]()
    return x.dtype if is_fast else torch.float32


def _span_of(flags: Tensor) -> tuple[int, int]:
    """The least [start, stop) that has all true flags of (n,); (0, 0) if there are none."""
    if not flags.any():
        return 0, 0
    found = flags.nonzero()
    return int(found[0]), int(found[-1]) + 1


def _spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a range into spans (start, stop) of ``step`` each, or of 1 where that is 0; the last may be shorter."""
    step = max(step, 1)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
