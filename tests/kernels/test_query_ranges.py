"""A sequence in sections, one after the other: together they have what the whole has."""

from itertools import pairwise

import pytest
import torch
from running import Attended, attend, call_of, grouped, run_backward, run_forward, use_parts_of, use_tiles_of

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.fused.results import to_save
from lsg_attn.merging import merge, merge_backward
from lsg_attn.sections import Span, pieces_of
from lsg_attn.testing import TOLERANCES, Inputs, assert_close, make_inputs

B = 32
# Blocks that spans end after; the last span has the rest. The same twice: an empty span.
ENDS = [[4, 4, 5], [0, 3], [1, 2, 8], [5], [3, 9]]
# Tiles of rows and of the other side: of less than a block, and of more; None: the schedule's.
TILES = [None, (16, 32), (32, 16), (128, 64)]


class Part:
    """One call of a process, its forward done. Rows that are no queries hold what must not matter."""

    def __init__(self, inputs, pattern, piece, num_tokens, has_globals, options):
        count = pattern.num_global_tokens
        tokens = torch.arange(piece.keys.start, piece.keys.stop)
        is_query = (tokens >= piece.queries.start) & (tokens < piece.queries.stop)
        self.rows = torch.cat([torch.arange(count), count + tokens])  # in the whole sequence
        self.is_query = torch.cat([torch.ones(count, dtype=torch.bool), is_query])
        # The first token, where it is no query, has the query of the sequence's first.
        self.query_rows = torch.where((torch.arange(len(self.rows)) == count) & ~self.is_query, count, self.rows)
        self.has_query = self.is_query | (torch.arange(len(self.rows)) == count)
        query = inputs.query[:, :, self.query_rows].masked_fill(~self.has_query[:, None], 1e4)
        key, value, dout = (x[:, :, self.rows] for x in inputs[1:4])
        own = Inputs(query, key, value, dout, inputs.attention_mask[:, self.rows])
        section = piece.section(num_tokens, has_globals=has_globals)
        self.call = call_of(own, pattern, section=section, **options)
        self.saved = to_save(self.call, run_forward(self.call))
        self.out, lse = self.saved.out.cpu().float(), self.saved.lse.cpu()
        assert self.out[:, :, ~self.is_query].isnan().all()  # not written
        self.lse = lse.masked_fill(lse == torch.inf, -torch.inf)

    def gradients(self, dout, dlse):
        """The gradients of query, key and value from those of out and of the log-sum-exp."""
        dout, dlse = (
            x.masked_fill(~mask, torch.nan) for x, mask in ((dout, self.is_query[:, None]), (dlse, self.is_query))
        )
        grads = [x.cpu().float() for x in run_backward(self.call, self.saved, dout.to(self.saved.out.dtype), dlse)]
        assert (grads[0][:, :, ~self.has_query] == 0).all()
        return grads


def in_sections(inputs, pattern, ends, dlse, **options):
    """What processes whose spans end after so many blocks compute together, in float32 on the CPU."""
    count, num_tokens = pattern.num_global_tokens, inputs.query.shape[2] - pattern.num_global_tokens
    ends = [0, *(min(end * pattern.block_size, num_tokens) for end in ends), num_tokens]
    first, others = [], []  # parts of each process: the globals' results of the first one count
    for own in [Span(*x) for x in pairwise(ends)]:
        for i, piece in enumerate(pieces_of(pattern, own, num_tokens)):
            has_globals = not first
            (others if i else first).append(Part(inputs, pattern, piece, num_tokens, has_globals, options))
    merged = merge(
        *(torch.stack([x[:, :, :count] for x in xs]) for xs in zip(*((p.out, p.lse) for p in first), strict=True))
    )
    out, lse = (torch.full(shape, torch.nan) for shape in (inputs.query.shape, dlse.shape))
    out[:, :, :count], lse[:, :, :count] = merged.out, merged.lse
    grads = [torch.zeros(x.shape) for x in inputs[:3]]
    for i, part in enumerate([*first, *others]):
        own = part.is_query & (part.rows >= count)
        out[:, :, part.rows[own]], lse[:, :, part.rows[own]] = part.out[:, :, own], part.lse[:, :, own]
        dout_of_part, dlse_of_part = inputs.dout[:, :, part.rows].float(), dlse[:, :, part.rows]
        of_globals = 0.0, 0.0
        if i < len(first):
            of_globals = merge_backward(
                merged, i, part.out[:, :, :count], dout_of_part[:, :, :count], dlse[:, :, :count]
            )
        dout_of_part[:, :, :count], dlse_of_part[:, :, :count] = of_globals
        of_part = part.gradients(dout_of_part, dlse_of_part)
        for grad, x, rows in zip(grads, of_part, (part.query_rows, part.rows, part.rows), strict=True):
            grad.index_add_(2, rows, x)
    return Attended(out, lse, *grads)


def check(
    pattern, ends, num_tokens, padding="none", heads=2, head_dim=16, dtype=torch.float32, group=1, shift=0.0,
    **options,
):  # fmt: skip
    """Compare with the whole: globals apart, as their gradients are sums over all tokens.

    ``shift``: of queries up and of keys down, so that scores are far below 0.
    """
    count = pattern.num_global_tokens
    inputs = make_inputs(1, heads, count + num_tokens, head_dim, dtype, padding, num_kept=count + 1)
    inputs = grouped(inputs, group)
    inputs = inputs._replace(query=inputs.query + shift, key=inputs.key - shift)
    dlse = torch.randn(inputs.query.shape[:3], generator=torch.Generator().manual_seed(1))
    expected = attend(inputs, pattern, dlse, **options)
    got = in_sections(inputs, pattern, ends, dlse, **options)
    assert torch.equal(got.lse == -torch.inf, expected.lse.cpu() == torch.inf)
    expected, got = (x._replace(lse=x.lse.masked_fill(x.lse.isinf(), 0.0)) for x in (expected, got))
    for name, x, y in zip(Attended._fields, got, expected, strict=True):
        for part, rows in (("globals", slice(count)), ("tokens", slice(count, None))):
            assert_close(f"{name} of {part}", x[:, :, rows], y[:, :, rows].cpu().float(), TOLERANCES[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_sections_give_the_whole(sparsity_type, causal, monkeypatch):
    """Globals, padding, spans, tiles, shared keys and dropout differ by type. What dropout drops is the same."""
    i = SPARSITY_TYPES.index(sparsity_type) + 3 * causal
    if (tile := TILES[i % 4]) is not None:
        use_tiles_of(*tile, monkeypatch)
    pattern = LSGPattern(B, 8, 4, sparsity_type, (1, 0, 17)[i % 3], causal=causal)
    dropout = {"dropout_p": 0.3, "seed": 7} if i % 2 else {}
    group, padding = 1 + (i % 4 == 2), ("random", "none", "right", "left")[i % 4]
    check(pattern, ENDS[i % 5], 9 * B - 3, padding, 2 * group, group=group, **dropout)


@pytest.mark.every_kernel
@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])
def test_blocks_as_large_as_a_tile(sparsity_type):
    pattern = LSGPattern(sparsity_type=sparsity_type, sparse_block_size=64)
    check(pattern, [3], 5 * 128 - 60, "random", 1, 64, torch.bfloat16)


def test_blocks_that_tiles_and_groups_of_four_do_not_divide():
    check(LSGPattern(18, 9, 3, "norm", 5), [2, 2, 7], 18 * 9 + 7, "random")


@pytest.mark.parametrize(("ends", "num_tokens"), [([1], 2 * B), ([1, 1], B), ([1, 2], 2 * B + 1)])
def test_short_sequences(ends, num_tokens):
    """Attention is dense, or barely not: sections of longer sequences that are as short, and empty ones."""
    check(LSGPattern(B, B, 4, "lsh", 3), ends, num_tokens, dropout_p=0.3, seed=7)


@pytest.mark.parametrize("causal", [False, True])
def test_parts_of_the_globals(causal, monkeypatch):
    """Several parts of each section, of positions and of queries; some are empty."""
    use_parts_of(16, monkeypatch)
    use_tiles_of(32, 16, monkeypatch)
    check(LSGPattern(B, 8, 4, "pooling", 20, causal=causal), [2, 3], 9 * B, "random")


@pytest.mark.parametrize("causal", [False, True])
def test_no_tile_takes_queries_past_its_range(causal, monkeypatch):
    """Tiles are larger than blocks: the probability of a row that is read as 0 would be infinite."""
    use_tiles_of(16, 32, monkeypatch)
    check(LSGPattern(16, 0, 4, "none", 1, causal=causal), [1, 4], 16 * 7, shift=8.0)
