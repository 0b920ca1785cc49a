"""Packed sequences: each has what it has alone, whatever the others are."""

import pytest
import torch
from comparing import assert_same_bits
from running import DEVICE, DTYPES, Attended, attend, call_of, grouped, use_parts_of, use_tiles_of

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention_varlen
from lsg_attn.fused import variant
from lsg_attn.testing import Inputs, assert_close, make_inputs

B, G = 32, 3
# Tokens of the sequences after the globals; None: no row at all. Dense ones come between others, and first and last.
TOKENS = [0, 7 * B - 3, None, 1, 2 * B, 2 * B + 1, None, 3 * B, 0]


def pack(pattern, tokens, heads, head_dim, dtype, seed=0):
    """Inputs of packed sequences, cu_seqlens and max_seqlen."""
    lengths = [0 if n is None else pattern.num_global_tokens + n for n in tokens]
    inputs = make_inputs(1, heads, sum(lengths), head_dim, dtype, seed=seed)
    return inputs, torch.tensor([0, *lengths]).cumsum(0), max(lengths)


def each(inputs, cu_seqlens):
    """The rows and the inputs of each sequence that is not empty."""
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        if start < stop:
            rows = slice(start, stop)
            yield rows, Inputs(*(x[:, :, rows] for x in inputs[:4]), inputs.attention_mask[:, rows])


def check(pattern, tokens=TOKENS, heads=2, head_dim=16, dtype=torch.float32, group=1, index_dtype=torch.int32):
    """Compare with each sequence alone, to the bit, and with the same again."""
    inputs, cu_seqlens, longest = pack(pattern, tokens, heads, head_dim, dtype)
    inputs = grouped(inputs, group)
    dlse = torch.randn(inputs.query.shape[:3], generator=torch.Generator().manual_seed(1))
    packed = {"cu_seqlens": cu_seqlens.to(index_dtype), "max_seqlen": longest, "attention_mask": None}
    got = attend(inputs, pattern, dlse, **packed)
    for rows, alone in each(inputs, cu_seqlens):
        part = Attended(*(x[:, :, rows] for x in got))
        assert_same_bits(part, attend(alone, pattern, dlse[:, :, rows], attention_mask=None))
    assert_same_bits(attend(inputs, pattern, dlse, **packed), got)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_each_sequence_has_what_it_has_alone(sparsity_type):
    """Every other pattern is causal, and every third has shared keys."""
    i = SPARSITY_TYPES.index(sparsity_type)
    pattern = LSGPattern(B, B, 4, sparsity_type, G, causal=i % 2 == 1)
    group = (1, 1, 2)[i % 3]
    check(pattern, heads=2 * group, head_dim=(24, 16)[i % 2], dtype=DTYPES[i % 3], group=group)


@pytest.mark.every_kernel
@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])
def test_blocks_as_large_as_a_tile(sparsity_type):
    pattern = LSGPattern(sparsity_type=sparsity_type, sparse_block_size=64)
    check(pattern, [3 * 128 - 60, 100], 1, 64, torch.bfloat16, index_dtype=torch.int64)


@pytest.mark.parametrize(("tokens", "num_globals"), [([None], G), ([0, None, 0], G), ([5, 2 * B], 0), ([2 * B, 1], G)])
def test_short_sequences_only(tokens, num_globals):
    """No sequence has slots, or any token but the globals."""
    check(LSGPattern(B, B, 4, "lsh", num_globals), tokens)


@pytest.mark.parametrize("causal", [False, True])
def test_parts_of_the_globals(causal, monkeypatch):
    """Sequences have fewer parts than the longest one, which has more than are combined at once."""
    use_parts_of(16, monkeypatch)
    use_tiles_of(32, 16, monkeypatch)
    pattern = LSGPattern(B, B, 4, "bos_pooling", 20, causal=causal)
    check(pattern, [30, 0, 5 * B, None, 600], heads=4, group=2)


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(variant, "_INT32", 0)
    pattern = LSGPattern(B, B, 4, "pooling", G)
    inputs, cu_seqlens, longest = pack(pattern, TOKENS, 2, 16, torch.float32)
    assert variant.variant_of(call_of(inputs, pattern, None, cu_seqlens=cu_seqlens, max_seqlen=longest)).is_wide
    check(pattern)


def test_blocks_and_sums_of_a_sequence_are_its_own():
    """Sequences that start anywhere in a block: their stretches of slots and of sums do not overlap."""
    pattern = LSGPattern(18, 36, 3, "norm", 5)
    check(pattern, [18 * 4 - 5, 1, 18 * 3, 18 * 5 + 1, 18 * 3 - 1, 18 * 3 + 1])


@pytest.mark.parametrize("sparsity_type", ["stride", "lsh"])
def test_dropout_is_that_of_the_padded_batch(sparsity_type):
    """Which has as many tokens and slots for each sequence as the longest one."""
    pattern, tokens = LSGPattern(B, B, 4, sparsity_type, G), [7 * B - 3, 2 * B, 5 * B + 1]
    inputs, cu_seqlens, longest = pack(pattern, tokens, 2, 16, torch.float32)
    lengths = cu_seqlens.diff().tolist()
    padded = [
        torch.nn.utils.rnn.pad_sequence([x[0].transpose(0, 1) for x in x.split(lengths, 2)], True).transpose(1, 2)
        for x in inputs[:4]
    ]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    options = {"dropout_p": 0.3, "seed": 7}
    expected = attend(Inputs(*padded, mask), pattern, **options)
    got = attend(inputs, pattern, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=longest, **options)
    for name, x, y in zip(Attended._fields, got, expected, strict=True):
        assert_close(name, x.cpu(), torch.cat([y[i : i + 1, :, :n] for i, n in enumerate(lengths)], 2).cpu(), 1e-6)


def test_lsg_attention_varlen_runs_them():
    """Out, the log-sum-exp and gradients, of (total, heads, head_dim)."""
    pattern, tokens = LSGPattern(B, B, 4, "pooling", G), [5 * B + 1, None, 40]
    inputs, cu_seqlens, longest = pack(pattern, tokens, 4, 16, torch.float32)
    found = []
    for implementation, device, dtype in (("triton", DEVICE, torch.float32), ("reference", "cpu", torch.float64)):
        rows = [x[0].transpose(0, 1).to(device, dtype).requires_grad_() for x in grouped(inputs, 2)[:3]]
        out, lse = lsg_attention_varlen(
            *rows, cu_seqlens.to(device), longest, pattern, implementation=implementation, return_lse=True
        )
        dout = inputs.dout[0].transpose(0, 1).to(device, dtype)
        found.append((out, lse, *torch.autograd.grad((out * dout).sum() + lse.sin().sum(), rows)))
    for name, x, y in zip(Attended._fields, *found, strict=True):
        assert_close(name, x.cpu(), y)
