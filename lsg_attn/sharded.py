"""The attention of a sequence that processes share out: each answers for its own tokens, and for the globals with all.

Forward, a process starts to fetch the keys and values around its own, answers the queries that need none of these, then
the others, and merges what all have found for the globals. Backward, it first finds what it owes to the tokens that it
fetched, and sends that while it does the rest. How much is sent does not depend on the length of the sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .arguments import DTYPES
from .call import Call
from .communication import Group, Message
from .dispatch import IMPLEMENTATIONS, answer_here, draw_seed
from .merging import merge, merge_backward
from .pattern import SPARSITY_TYPES, LSGPattern
from .sections import Piece, Span, halo_of, pieces_of, spans_of


class Shard:
    """What of a sequence a process has, what it does, and what goes to and comes from others.

    Attributes:
        own: the tokens that it has.
        num_tokens: T of the sequence.
        pieces: what it answers, see :func:`.sections.pieces_of`.
        sends, receives: the tokens that go to, or come from, each other process that any go to or come from.
    """

    def __init__(self, group: Group, pattern: LSGPattern, sizes: Sequence[int]) -> None:
        spans = spans_of(sizes, pattern.block_size)
        self.own, self.num_tokens = spans[group.rank], spans[-1].stop
        self.pieces = pieces_of(pattern, self.own, self.num_tokens)
        halos = [halo_of(pattern, span, self.num_tokens) for span in spans]
        sends = ((rank, self.own.common(part)) for rank, parts in enumerate(halos) for part in parts)
        receives = ((rank, span.common(part)) for rank, span in enumerate(spans) for part in halos[group.rank])
        self.sends, self.receives = ({rank: x for rank, x in pairs if x.size} for pairs in (sends, receives))


def sharded_attention(
    group: Group, call: Call, implementation: str, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The output (batch, heads, rows, head_dim) of this process's rows, and with ``return_lse`` its log-sum-exp.

    ``call``: of the rows of the globals and of the tokens that this process has.

    Raises:
        ValueError: processes ask for different things, their tokens are not whole blocks, or it cannot be shared out.
    """
    if call.cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None under context_parallel, which shares out one sequence at a time")
    if call.dropout_p and implementation == "reference":
        raise ValueError("implementation='reference' draws dropout for a whole sequence; use another, or dropout_p=0")
    if group.size == 1:
        return answer_here(call, implementation, return_lse)
    if call.dropout_p:
        call = replace(call, seed=draw_seed(call))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
    sizes, seed, some_have_mask = _agree(group, call, implementation, return_lse, needs_grad)
    if call.dropout_p:
        call = replace(call, seed=torch.tensor(seed, device="cpu"))
    if some_have_mask and call.attention_mask is None:  # this process has no padding
        call = replace(call, attention_mask=call.keep())
    options = (call, implementation, group, Shard(group, call.pattern, sizes), needs_grad)
    out, lse = _ShardedAttention.apply(call.query, call.key, call.value, options)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def _agree(
    group: Group, call: Call, implementation: str, return_lse: bool, needs_grad: bool
) -> tuple[list[int], int, bool]:  # fmt: skip
    """What only all processes know, once they are found to ask for the same.

    It is the number of tokens that each has, the seed of the first one, and whether some have a mask.
    """
    query, key, pattern = call.query, call.key, call.pattern
    alike: dict[str, Any] = {
        "dtype": DTYPES.index(query.dtype),
        "batch": query.shape[0],
        "heads": query.shape[1],
        "key heads": key.shape[1],
        "head_dim": query.shape[3],
        **vars(pattern),
        "sparsity_type": SPARSITY_TYPES.index(pattern.sparsity_type),
        "dropout_p": _bits(call.dropout_p),
        "scale": _bits(call.scale),
        "first_head": call.first_head,
        "lsh_projections": len(call.projections),
        "implementation": IMPLEMENTATIONS.index(implementation),
        "return_lse": return_lse,
        "requires_grad": needs_grad,
    }
    has_mask = call.attention_mask is not None
    numbers = [*map(int, alike.values()), call.num_tokens, call.seed_value(), int(has_mask)]
    device = group.device_of_numbers(query.device)
    found = group.all_gather(torch.tensor(numbers, dtype=torch.int64, device=device))().tolist()
    for i, name in enumerate(alike):
        if len({row[i] for row in found}) > 1:
            values = [_READABLE.get(name, int)(row[i]) for row in found]
            raise ValueError(f"{name}: expected the same on all ranks of context_parallel, got {values} in their order")
    sizes, seeds, masks = zip(*(row[-3:] for row in found), strict=True)
    return list(sizes), seeds[0], any(masks)


def _bits(x: float) -> int:
    """The integer that has the 64 bits of x."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _float(bits: int) -> float:
    """The reverse of :func:`_bits`."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


# How the numbers that stand for something else are told.
_READABLE: dict[str, Any] = {
    "dtype": DTYPES.__getitem__,
    "sparsity_type": SPARSITY_TYPES.__getitem__,
    "dropout_p": _float,
    "scale": _float,
    "implementation": IMPLEMENTATIONS.__getitem__,
    "causal": bool,
    "return_lse": bool,
    "requires_grad": bool,
}


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """``options``: those of _Run, whose call has the same tensors."""
        ctx.run = _Run(*options)
        ctx.set_materialize_grads(False)
        out, lse = ctx.run.forward()
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.run is None:
            raise RuntimeError(
                "context parallelism: this attention was differentiated before, and what that takes is freed; pass "
                "retain_graph=True the first time"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("context parallelism: this attention can be differentiated once, without create_graph")
        grads = ctx.run.backward(dout, dlse)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.run = None
        return *grads, None


class _Part(NamedTuple):
    """A piece that was answered: the leaves of its graph, and the ends of it that are its output and log-sum-exp."""

    piece: Piece
    leaves: list[Tensor]
    ends: tuple[GradientEdge, GradientEdge]


class _Run:
    """One attention of a shard, forward and backward: what the second needs of the first is kept here.

    Rows of tokens, or of globals, are tensors (batch, ..., rows, width).
    """

    def __init__(self, call: Call, implementation: str, group: Group, shard: Shard, needs_grad: bool) -> None:
        self.call, self.implementation, self.group, self.shard = call, implementation, group, shard
        self.count, self.needs_grad = call.pattern.num_global_tokens, needs_grad
        self.weights_by_query = call.pattern.rule.has_weight_gradient and not call.pattern.is_dense(shard.num_tokens)
        self.parts: list[_Part] = []

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp of the shard's rows."""
        query, shard, count = self.call.query, self.shard, self.count
        whole = [query, self.call.key, self.call.value]
        if self.call.attention_mask is not None:
            whole.append(self.call.keep()[:, None, :, None])
        # 1. Start to fetch keys, values and mask.
        own = [x[:, :, count:] for x in whole[1:]]
        fetched = {rank: [_empty_rows(x, span.size) for x in own] for rank, span in shard.receives.items()}
        sends = {rank: [_within(x, shard.own, span) for x in own] for rank, span in shard.sends.items()}
        wait = self._start_exchange(sends, fetched)
        # 2. Answer what needs none of these.
        first_query = self._fetch_first_query()
        main, *others = shard.pieces
        rows = [self._queries(main, first_query), *whole[1:]]
        found = self._attend(main, rows, has_globals=self.group.rank == 0)
        of_globals = torch.cat([found[0][:, :, :count].to(found[1].dtype), found[1][:, :, :count, None]], -1)
        gathered = self.group.all_gather(of_globals)
        out, lse = found
        if self.needs_grad:  # what was found may be kept for the backward
            out, lse = self._empty_out(), self._empty_lse()
            self._put_results(main, found, (out, lse))
        del found
        # 3. Answer what does.
        wait()
        segments = [(shard.own, own), *((span, fetched[rank]) for rank, span in shard.receives.items())]
        segments.sort(key=lambda segment: segment[0])
        for piece in others:
            keys = [_cut([(span, x[i]) for span, x in segments], piece.keys) for i in range(len(own))]
            keys = [torch.cat([x[:, :, :count], y], 2) for x, y in zip(whole[1:], keys, strict=True)]
            self._put_results(piece, self._attend(piece, [self._queries(piece, first_query), *keys]), (out, lse))
        # 4. Merge what all have found for the globals.
        outs, lses = gathered().split([query.shape[3], 1], -1)
        self.merged, self.out_of_globals = merge(outs, lses[..., 0]), outs[self.group.rank]
        out[:, :, :count], lse[:, :, :count] = self.merged.out, self.merged.lse
        return out, lse

    def backward(self, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the shard's queries, keys and values."""
        key, shard, count = self.call.key, self.shard, self.count
        dout = self._empty_out().zero_() if dout is None else dout
        has_dlse, dlse = dlse is not None, self._empty_lse().zero_() if dlse is None else dlse
        # 1. Start to sum what all processes have of the gradients of the globals' results.
        of_globals = [dout[:, :, :count].to(dlse.dtype), dlse[:, :, :count, None]]
        gathered = self.group.all_gather(torch.cat(of_globals, -1))
        # 2. Differentiate what needed tokens of others, and start to send what is theirs.
        main, *others = self.parts
        found = []
        dfetched = {rank: [_empty_rows(key, span.size).zero_() for _ in "kv"] for rank, span in shard.receives.items()}
        for part in others:
            grads = self._differentiate(part, *self._of_piece(part.piece, dout, dlse if has_dlse else None))
            found.append((part.piece, grads))
            for rank, span in shard.receives.items():
                for x, grad in zip(dfetched[rank], grads[1:], strict=True):
                    _add(x, span, grad[:, :, count:], part.piece.keys)
        returned = {rank: [_empty_rows(key, span.size) for _ in "kv"] for rank, span in shard.sends.items()}
        wait = self._start_exchange(dfetched, returned)
        # 3. Differentiate the rest.
        dmerged = gathered().sum(0)
        dout_part, dlse_part = merge_backward(
            self.merged, self.group.rank, self.out_of_globals, dmerged[..., :-1], dmerged[..., -1]
        )
        dout = torch.cat([dout_part.to(dout.dtype), dout[:, :, count:]], 2)
        dlse = torch.cat([dlse_part, dlse[:, :, count:]], 2) if has_dlse or count else None
        dquery, dkey, dvalue = self._differentiate(main, dout, dlse)
        # 4. Add up: of this process, then of the others in the order of their ranks.
        if self.weights_by_query:
            taken = [self._take_first(piece, x[0]) for piece, x in [(main.piece, (dquery,)), *found]]
            of_first = self.group.all_gather(torch.stack(taken).sum(0))
        for piece, (dq, *dkeys) in found:
            _add(dquery[:, :, count:], shard.own, dq[:, :, count:], piece.keys)
            for x, grad in zip((dkey, dvalue), dkeys, strict=True):
                x[:, :, :count] += grad[:, :, :count]
                _add(x[:, :, count:], shard.own, grad[:, :, count:], piece.keys)
        wait()
        for rank, span in shard.sends.items():
            for x, grad in zip((dkey, dvalue), returned[rank], strict=True):
                _add(x[:, :, count:], shard.own, grad, span)
        if self.weights_by_query:
            dfirst = of_first().sum(0)
            if self.group.rank == 0:
                dquery[:, :, count : count + 1] += dfirst
        return dquery, dkey, dvalue

    def _start_exchange(self, sends: dict[int, list[Tensor]], receives: dict[int, list[Tensor]]) -> Callable[[], None]:
        return self.group.exchange(
            [Message(rank, [x.contiguous() for x in rows]) for rank, rows in sends.items()],
            [Message(rank, rows) for rank, rows in receives.items()],
        )

    def _empty_out(self) -> Tensor:
        """An uninitialised output of the shard's rows, in memory as an output projection wants it."""
        batch, heads, length, head_dim = self.call.query.shape
        return self.call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)

    def _empty_lse(self) -> Tensor:
        """An uninitialised log-sum-exp of the shard's rows."""
        query = self.call.query
        return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))

    def _fetch_first_query(self) -> Tensor | None:
        """The query (batch, heads, 1, head_dim) of the sequence's first token, where tokens are weighted by it."""
        if not self.weights_by_query:
            return None
        tokens = self.call.query[:, :, self.count :]
        first = tokens[:, :, :1].contiguous() if self.group.rank == 0 else _empty_rows(tokens, 1)
        self.group.broadcast(first)
        return first

    def _put_results(self, piece: Piece, found: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> None:
        """Copy the results for a piece's tokens to those of the shard."""
        for x, out in zip(found, to, strict=True):
            _put(out[:, :, self.count :], self.shard.own, x[:, :, self.count :], piece.keys, piece.queries)

    def _queries(self, piece: Piece, first_query: Tensor | None) -> Tensor:
        """The query of a piece, with a row for each of its keys; see :class:`.call.Section`."""
        query, count = self.call.query, self.count
        first_query = first_query if piece.lacks_first_query else None
        if piece.keys == self.shard.own and first_query is None:
            return query
        rows = query.new_zeros(*query.shape[:2], count + piece.keys.size, query.shape[3])
        rows[:, :, :count] = query[:, :, :count]
        if first_query is not None:
            rows[:, :, count : count + 1] = first_query
        _put(rows[:, :, count:], piece.keys, query[:, :, count:], self.shard.own, piece.queries)
        return rows

    def _attend(self, piece: Piece, rows: list[Tensor], has_globals: bool = False) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp of a piece, of queries, keys, values and perhaps a mask."""
        section = piece.section(self.shard.num_tokens, has_globals=has_globals)
        leaves = [x.detach().requires_grad_(self.needs_grad) for x in rows[:3]]
        mask = rows[3][:, 0, :, 0] if len(rows) > 3 else None
        query, key, value = leaves
        call = replace(self.call, query=query, key=key, value=value, attention_mask=mask, section=section)
        with torch.set_grad_enabled(self.needs_grad):
            out, lse = answer_here(call, self.implementation, True)
        if self.needs_grad:
            self.parts.append(_Part(piece, leaves, (get_gradient_edge(out), get_gradient_edge(lse))))
        return out.detach(), lse.detach()

    def _differentiate(self, part: _Part, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients of a part's query, key and value."""
        ends, grads = (part.ends[:1], (dout,)) if dlse is None else (part.ends, (dout, dlse))
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return torch.autograd.grad(ends, part.leaves, grads, retain_graph=keep)

    def _of_piece(self, piece: Piece, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients of a piece's results, 0 but for its queries that are tokens."""
        found = []
        for x in (dout, dlse):
            if x is not None:
                rows = x.new_zeros(*x.shape[:2], self.count + piece.keys.size, *x.shape[3:])
                _put(rows[:, :, self.count :], piece.keys, x[:, :, self.count :], self.shard.own, piece.queries)
                found.append(rows)
        return found[0], found[1] if len(found) > 1 else None

    def _take_first(self, piece: Piece, dquery: Tensor) -> Tensor:
        """What a piece gives to the query of the sequence's first token, which is none of its own; 0 is left there."""
        row = dquery[:, :, self.count : self.count + 1]
        if not piece.lacks_first_query:
            return dquery.new_zeros(*dquery.shape[:2], 1, dquery.shape[3])
        taken = row.clone()
        row.zero_()
        return taken


def _empty_rows(x: Tensor, count: int) -> Tensor:
    """Uninitialised rows like those of x (batch, ..., rows, width)."""
    return x.new_empty(*x.shape[:-2], count, x.shape[-1])


def _within(x: Tensor, span: Span, part: Span) -> Tensor:
    """The rows of ``part`` out of those of ``span``, x (batch, heads, rows, ...)."""
    return x[:, :, part.start - span.start : part.stop - span.start]


def _put(out: Tensor, span: Span, x: Tensor, of: Span, part: Span) -> None:
    """Copy the rows of ``part`` from those of the span ``of``, x, to those of ``span``, out."""
    _within(out, span, part).copy_(_within(x, of, part))


def _add(out: Tensor, span: Span, x: Tensor, of: Span) -> None:
    """Add rows of the span ``of``, x, to those of ``span``, out, where they are the same tokens'."""
    common = span.common(of)
    if common.size:
        _within(out, span, common).add_(_within(x, of, common))


def _cut(segments: list[tuple[Span, Tensor]], span: Span) -> Tensor:
    """The rows of ``span`` out of segments that follow each other."""
    common = [(of, x, of.common(span)) for of, x in segments]
    return torch.cat([_within(x, of, part) for of, x, part in common if part.size], 2)
