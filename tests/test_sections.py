"""A sequence in sections, one after the other in one process: the results of the whole."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import HEADS, cases

from lsg_attn import lsg_attention
from lsg_attn.arguments import checked_call
from lsg_attn.dispatch import answer
from lsg_attn.merging import merge
from lsg_attn.sections import Span, pieces_of
from lsg_attn.testing import TOLERANCES, assert_close, make_inputs


def in_sections(pattern, spans, query, key, value, mask, implementation, dropout_p=0.0):
    """What processes with these spans of tokens compute together: out and lse of all rows."""
    count, num_tokens = pattern.num_global_tokens, spans[-1].stop
    globals_, tokens = [], []
    for rank, own in enumerate(spans):
        for i, piece in enumerate(pieces_of(pattern, own, num_tokens)):
            rows = torch.cat([torch.arange(count), torch.arange(count + piece.keys.start, count + piece.keys.stop)])
            is_query = (rows < count) | ((rows >= count + piece.queries.start) & (rows < count + piece.queries.stop))
            # what is no query must not matter, but for the first token's
            q = torch.where(is_query[:, None], query[:, :, rows], 1e3)
            if piece.keys.size and not is_query[count]:
                q = torch.cat([q[:, :, :count], query[:, :, count : count + 1], q[:, :, count + 1 :]], 2)
            k, v = key[:, :, rows], value[:, :, rows]
            call = checked_call(q, k, v, pattern, mask[:, rows], dropout_p, None, None, None)
            section = piece.section(num_tokens, has_globals=rank == 0 and i == 0)
            with torch.random.fork_rng():
                out, lse = answer(replace(call, section=section), implementation, True)
            if i == 0:
                globals_.append((out[:, :, :count], lse[:, :, :count]))
            own_rows = slice(count + section.start, count + section.stop)
            tokens.append((piece.queries.start, out[:, :, own_rows], lse[:, :, own_rows]))
    merged = merge(*(torch.stack(x) for x in zip(*globals_, strict=True)))
    tokens = [x[1:] for x in sorted(tokens, key=lambda x: x[0])]
    return [torch.cat(x, 2) for x in zip(merged[:2], *tokens, strict=True)]


def compare(pattern, spans, inputs, implementation, tolerance, **options):
    options["implementation"] = implementation
    found = []
    for attend in (
        lambda *x: lsg_attention(*x[:3], pattern, x[3], return_lse=True, **options),
        lambda *x: in_sections(pattern, spans, *x, **options),
    ):
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out, lse = attend(*leaves, inputs.attention_mask)
        dlse = inputs.dout[..., 0].masked_fill(lse.isinf(), 0)
        torch.autograd.backward((out, lse.masked_fill(lse.isinf(), 0)), (inputs.dout, dlse.to(lse.dtype)))
        found.append([out, lse.masked_fill(lse.isinf(), 0), *(x.grad for x in leaves)])
    for name, got, expected in zip(("out", "lse", "dquery", "dkey", "dvalue"), *reversed(found), strict=True):
        assert_close(name, got, expected, tolerance)


def spans_like(blocks, num_tokens, block_size):
    """Spans that end after so many blocks, as far as there are any."""
    ends = [min(end * block_size, num_tokens) for end in (0, *sorted(blocks))]
    return [Span(*x) for x in pairwise([*ends, num_tokens])]


@pytest.mark.parametrize("implementation", ["reference", "torch", "cpp"])
@given(case=cases(causal=None), blocks=st.lists(st.integers(0, 8), max_size=3))
@settings(max_examples=150)
def test_sections_give_the_whole(implementation, case, blocks):
    pattern, length, padding = case
    spans = spans_like(blocks, length - pattern.num_global_tokens, pattern.block_size)
    dtype = torch.float32 if implementation == "cpp" else torch.float64
    inputs = make_inputs(2, HEADS, length, 6, dtype, padding)
    compare(pattern, spans, inputs, implementation, TOLERANCES[dtype])


@given(case=cases(causal=None), blocks=st.lists(st.integers(0, 8), max_size=3))
def test_sections_drop_what_the_whole_drops(case, blocks):
    pattern, length, padding = case
    spans = spans_like(blocks, length - pattern.num_global_tokens, pattern.block_size)
    inputs = make_inputs(2, HEADS, length, 6, torch.float64, padding)
    compare(pattern, spans, inputs, "torch", 1e-10, dropout_p=0.5)
