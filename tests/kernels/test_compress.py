"""The compress kernels against the maps of the PyTorch compressions, in float64."""

import pytest
import torch
from running import exact_compression, forward, to_double

from lsg_attn import LSGPattern
from lsg_attn.compression import lsh_directions
from lsg_attn.testing import assert_close, make_inputs

PATTERNS = [
    LSGPattern(16, 32, 4, "norm", 3),
    LSGPattern(48, 24, 3, "norm", 0),
    LSGPattern(160, 160, 8, "norm", 1),  # chunks of two tiles, the second in part
    LSGPattern(18, 36, 3, "pooling", 3),
    LSGPattern(18, 36, 9, "bos_pooling", 3),
    LSGPattern(16, 16, 4, "lsh", 3),
    LSGPattern(48, 24, 3, "lsh", 0, lsh_num_pre_rounds=2),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern.sparsity_type}-B{pattern.block_size}")
@pytest.mark.parametrize("padding", ["none", "random", "left"])
def test_maps_equal_the_pytorch_compressions(pattern, padding):
    first = pattern.num_global_tokens
    length = first + 3 * pattern.block_size - 7
    inputs = make_inputs(2, 2, length, 24, padding=padding, garbage=1e3, num_kept=first + 1)
    results = forward(inputs, pattern, attention_mask=None if padding == "none" else "inputs")
    _, key, value, _, mask = to_double(inputs)
    expected = exact_compression(inputs, pattern, lsh_directions(pattern, 2, 24), 24**-0.5)
    index = results.slot_index.cpu()
    assert torch.equal(index >= 0, expected.keep)
    if pattern.sparsity_type == "norm":
        assert torch.equal(index[expected.keep].long(), expected.token[expected.keep])
        return
    kept = mask[:, None, first:].expand_as(expected.weight)
    assert torch.equal(index[expected.keep].long(), torch.arange(index.shape[-1]).expand_as(index)[expected.keep])
    assert_close("weight", results.weight.cpu(), expected.weight, 1e-6)
    if pattern.sparsity_type == "lsh":
        assert torch.equal(results.slot.cpu()[kept].long(), expected.slot[kept])
    rows = expected.keep.unsqueeze(-1)
    for name, x, rows_of in (("key", key, results.sparse_key), ("value", value, results.sparse_value)):
        x = x[:, :, first:].where(mask[:, None, first:, None], 0.0)
        assert_close(name, rows_of.cpu() * rows, expected.apply(x) * rows, 1e-6)


def test_keys_of_equal_norm_are_ranked_by_position():
    inputs = make_inputs(1, 1, 1 + 60, 16)
    inputs.key.copy_(torch.ones_like(inputs.key))
    index = forward(inputs, LSGPattern(16, 16, 4, "norm")).slot_index.cpu()
    chunks = index.view(-1, 4)
    assert torch.equal(chunks, torch.arange(0, 64, 16).unsqueeze(-1) + torch.tensor([3, 2, 1, 0]))


def test_nan_norms_are_ranked_too():
    """Every slot names a token of its chunk, so that no gather reads outside."""
    inputs = make_inputs(1, 2, 1 + 60, 16)
    inputs.key[:, :, 5:40] = torch.nan
    index = forward(inputs, LSGPattern(16, 16, 4, "norm")).slot_index.cpu()
    chunk = torch.arange(4).repeat_interleave(4)
    assert torch.equal(index.div(16, rounding_mode="floor"), chunk.expand_as(index).int())
