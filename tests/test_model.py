"""bench.static.model: its counts against the reference's dense masks."""

from pathlib import Path

import pytest
import torch

from bench.flops import num_scores
from bench.static.model import DATA_SHEETS, model
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.reference import visible_slots, visible_tokens


@pytest.mark.parametrize("tokens", [1, 32, 33, 100, 250])
@pytest.mark.parametrize(
    "pattern",
    [
        LSGPattern(16, 16, 4),
        LSGPattern(16, 200, 2, "pooling", 5),
        LSGPattern(16, 0, 2, num_global_tokens=0),
        LSGPattern(16, 24, 2, num_global_tokens=3, causal=True),
    ],
)
def test_num_scores_equals_the_dense_masks(pattern, tokens):
    length = pattern.num_global_tokens + tokens
    expected = visible_tokens(pattern, length).sum() + visible_slots(pattern, length).sum()
    assert num_scores(pattern, tokens) == expected


def test_floors_of_a_forward():
    """Computed by hand for a dense sequence: 2 products of 2 flops; q, k, v, out in 16 bits, lse in 32."""
    shape, pattern = (2, 3, 1 + 100, 64), LSGPattern(128)
    got = model(pattern, shape, torch.bfloat16, "sm_80")
    assert got.flops == 4 * 64 * 6 * 101 * 101
    assert got.bytes_moved == 6 * 101 * (4 * 2 * 64 + 4)
    assert got.compute_us == pytest.approx(got.flops / 312e12 * 1e6)
    assert got.memory_us == pytest.approx(got.bytes_moved / 2.039e12 * 1e6)
    assert got.launches == ("_lsg_fwd_kernel", "_lsg_fwd_combine_kernel")


def test_floors_of_a_backward():
    """Computed by hand: 5 products; q, k, v, out, dout, dq, dk, dv in 16 bits, lse in 32."""
    got = model(LSGPattern(128), (2, 3, 1 + 100, 64), torch.bfloat16, "sm_80", is_backward=True)
    assert got.flops == 10 * 64 * 6 * 101 * 101
    assert got.bytes_moved == 6 * 101 * (8 * 2 * 64 + 4)
    # two sums of each query, in multiples of 128 rows and 128 more; a part of each gradient of the global
    assert got.bytes_scratch == 6 * 4 * (2 * (128 + 128 + 128) + 3 * 64)
    assert got.bytes_saved == 6 * 4 * (101 + 64)  # lse, and a block's slots, which a dense call leaves out
    assert got.launches == ("_lsg_bwd_sums_kernel", "_lsg_bwd_dq_dkv_kernel", "_lsg_bwd_combine_kernel")


@pytest.mark.parametrize("is_backward", [False, True])
def test_packed_sequences_cost_their_tokens(is_backward):
    """Eight short sequences and a long one, which a batch would pad to nine times as many rows."""
    pattern, long, short = LSGPattern(), 1 + 8192, 1 + 512
    options = (torch.bfloat16, "sm_90", is_backward)
    packed = model(pattern, (9, 16, long, 64), *options, lengths=[long, *[short] * 8])
    padded, one, other = (model(pattern, (n, 16, rows, 64), *options) for n, rows in ((9, long), (1, long), (8, short)))
    assert packed.flops == one.flops + other.flops
    assert packed.bytes_moved == pytest.approx(one.bytes_moved + other.bytes_moved, rel=0.01)
    # a forward of norm has only parts of the globals there, as many for each sequence as for the longest
    assert packed.bytes_scratch <= padded.bytes_scratch / (4 if is_backward else 1)
    assert packed.launches == padded.launches


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_kernels_page_has_these_figures(sparsity_type, is_backward):
    got = model(LSGPattern(sparsity_type=sparsity_type), (1, 16, 1 + 4096, 64), torch.bfloat16, "sm_90", is_backward)
    sizes = [got.flops / 1e9, got.bytes_moved / 1e6, got.bytes_scratch / 1e6]
    if not is_backward:
        sizes.append(got.bytes_saved / 1e6)
    row = f"| `{sparsity_type}` | {len(got.launches)} | " + " | ".join(f"{x:.1f}" for x in sizes) + " |"
    assert row in (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("target", DATA_SHEETS)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_launches_and_times_of_every_type_and_gpu(sparsity_type, target):
    sizes = (1, 4, 1 + 1024, 64)
    for is_backward, most in ((False, 3), (True, 6)):
        got = model(LSGPattern(sparsity_type=sparsity_type), sizes, torch.float32, target, is_backward)
        assert len(got.launches) <= most
        assert min(got.compute_us, got.memory_us) > 0
