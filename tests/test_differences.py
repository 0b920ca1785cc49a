"""The deliberate differences from the original, numbered as in the last section of docs/semantics.md."""

import pytest
import torch
from strategies import IMPLEMENTATIONS

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern
from lsg_attn.reference import visible_slots
from lsg_attn.testing import assert_close, make_inputs, run_attention, run_reference

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def seen_slots(pattern, num_tokens, block):
    row = pattern.num_global_tokens + block * pattern.block_size
    return visible_slots(pattern, pattern.num_global_tokens + num_tokens)[row].nonzero().flatten().tolist()


def assert_equals_reference(pattern, implementation, num_tokens, padding="none", dtype=torch.float64):
    inputs = make_inputs(2, 3, pattern.num_global_tokens + num_tokens, 8, dtype, padding)
    expected = run_reference(inputs, pattern)
    for name, x in run_attention(inputs, pattern, implementation=implementation).items():
        assert_close(name, x, expected[name])


@each_implementation
def test_1_factor_equal_to_the_block_size(implementation):
    """The original's right window starts two compressed keys early, inside the local window."""
    pattern = LSGPattern(8, 3, 8, "pooling")
    assert seen_slots(pattern, 80, 4) == [0, 1, 2, 6, 7, 8]
    assert_equals_reference(pattern, implementation, 80)


@each_implementation
def test_2_bos_pooling_masks_a_group_of_padding(implementation):
    """The original attends to groups that are all padding, so that their contents matter."""
    pattern = LSGPattern(8, 8, 4, "bos_pooling")
    outs = []
    for garbage in (1e-3, 1e3):
        inputs = make_inputs(1, 2, 1 + 64, 8, torch.float64, "right", garbage=garbage)
        assert not inputs.attention_mask[0, 48:].any()
        outs.append(run_attention(inputs, pattern, implementation=implementation)["out"][:, :, :40])
    assert torch.equal(*outs)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_3_every_type_in_every_dtype(implementation, dtype, sparsity_type):
    """pooling and lsh fail in float16 and bfloat16 in the original."""
    assert_equals_reference(LSGPattern(8, 8, 2, sparsity_type), implementation, 64, "right", dtype)


@each_implementation
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_4_odd_steps(implementation, sparsity_type):
    pattern = LSGPattern(12, 12, 4, sparsity_type)
    assert pattern.step in (0, 3)
    assert_equals_reference(pattern, implementation, 84, "middle")


@each_implementation
def test_5_few_sparse_keys(implementation):
    """4 s f <= 3 B: the original's slices start before the array and lose keys."""
    pattern = LSGPattern(16, 4, 2, "stride")
    assert seen_slots(pattern, 128, 3) == [12, 13, 14, 15, 40, 41, 42, 43]
    assert_equals_reference(pattern, implementation, 128)


@each_implementation
@pytest.mark.parametrize("num_tokens", [20, 64])
def test_6_the_callers_tensors_are_left_alone(implementation, num_tokens):
    inputs = make_inputs(2, 2, 1 + num_tokens, 8, torch.float64, "random", garbage=1e3)
    before = [x.clone() for x in inputs]
    run_attention(inputs, LSGPattern(8, 8, 2), implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@each_implementation
@pytest.mark.parametrize("num_tokens", [1, 7, 17, 25, 31, 33])
def test_7_every_length_works(implementation, num_tokens):
    layer = LSGAttention(8, 2, LSGPattern(8, 8, 2, num_global_tokens=2), implementation=implementation)
    assert layer(torch.randn(1, 2 + num_tokens, 8)).shape == (1, 2 + num_tokens, 8)
