"""In the place of PyTorch's own attention: weights taken over, an encoder layer's attention, globals anywhere."""

import copy

import pytest
import torch
from torch import nn

from lsg_attn import (
    SPARSITY_TYPES,
    LSGAttention,
    LSGMultiheadAttention,
    LSGPattern,
    attention_weights,
    lsg_attention,
    with_global_positions,
)
from lsg_attn.testing import make_inputs

SHORT = LSGPattern(16, 16, 2, num_global_tokens=1)  # where T <= 2B = 32, all see all


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [LSGAttention, LSGMultiheadAttention])
def test_takes_the_weights_of_pytorchs_attention(cls, bias):
    dense = nn.MultiheadAttention(12, 3, dropout=0.1, bias=bias, batch_first=True, dtype=torch.float64).eval()
    layer = cls.from_multihead(dense, SHORT)
    assert not layer.training
    assert layer.dropout == 0.1
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    expected, _ = dense(x, x, x, need_weights=False)
    got = layer(x) if cls is LSGAttention else layer(x, x, x)[0]
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        dense.in_proj_weight.zero_()
    assert layer.q_proj.weight.abs().min() > 0  # copies


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kdim": 8}, "kdim"), ({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")],
)
def test_refuses_what_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        LSGAttention.from_multihead(nn.MultiheadAttention(12, 3, **options))
    with pytest.raises(TypeError, match=r"expected a torch.nn.MultiheadAttention, got Linear"):
        LSGAttention.from_multihead(nn.Linear(2, 2))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_stands_in_an_encoder_layer(batch_first, norm_first):
    """With padding, in training and in evaluation, alone and in a stack of copies."""
    plain = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    ours = copy.deepcopy(plain)
    ours.self_attn = LSGMultiheadAttention.from_multihead(ours.self_attn, SHORT)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    padding = torch.arange(30) >= torch.tensor([[30], [21]])
    rows = ~padding[..., None]
    x = x if batch_first else x.transpose(0, 1)
    stacks = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in (plain, ours)]
    for is_training in (True, False):
        expected, got = (stack.train(is_training)(x, src_key_padding_mask=padding) for stack in stacks)
        if not batch_first:
            expected, got = expected.transpose(0, 1), got.transpose(0, 1)
        torch.testing.assert_close(got * rows, expected * rows)


@pytest.mark.parametrize("is_bool", [True, False])
def test_padding_masks_are_pytorchs(is_bool):
    """True or -inf for padding."""
    dense = nn.MultiheadAttention(12, 3, batch_first=True)
    x, padding = torch.randn(2, 30, 12), torch.arange(30) >= torch.tensor([[30], [21]])
    mask = padding if is_bool else torch.zeros(2, 30).masked_fill(padding, -torch.inf)
    expected, _ = dense(x, x, x, mask, need_weights=False)
    got, weights = LSGMultiheadAttention.from_multihead(dense, SHORT)(x, x, x, mask)
    assert weights is None
    torch.testing.assert_close(got[~padding], expected[~padding])


def test_causal_patterns_take_the_hint():
    layer = LSGMultiheadAttention(8, 2, LSGPattern(8, 8, 2, num_global_tokens=0, causal=True), batch_first=True)
    x = torch.randn(1, 16, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    got, _ = layer(x, x, x, attn_mask=mask, is_causal=True)
    dense = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        dense.in_proj_weight.copy_(torch.cat([p.weight for p in layer.projections()]))
        dense.in_proj_bias.copy_(torch.cat([p.bias for p in layer.projections()]))
        dense.out_proj.load_state_dict(layer.out_proj.state_dict())
    torch.testing.assert_close(got, dense(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])


def test_refuses_calls_by_the_arguments_name():
    layer, x = LSGMultiheadAttention(8, 2, SHORT, batch_first=True), torch.randn(1, 16, 8)
    for arguments, message in (
        ((x, x.clone(), x), "key, value: expected the tensor that query is"),
        ((x, x, x, None, True), "need_weights: expected False"),
        ((x, x, x, None, False, torch.zeros(16, 16)), "attn_mask: expected None"),
        ((x, x, x, None, False, None, True, True), "is_causal: expected False"),
        ((x, x, x, torch.full((1, 16), 0.5)), "key_padding_mask: expected 0 for tokens and -inf"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)


def test_device_and_dtype_are_those_asked_for():
    layer = LSGAttention(8, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("tokens", [20, 90])
def test_attention_weights_give_the_output(sparsity_type, tokens, causal, key_heads):
    pattern = LSGPattern(16, 8, 2, sparsity_type, 3, causal=causal)
    inputs = make_inputs(2, 4, 3 + tokens, 8, torch.float64, "random", num_kept=4)
    query, key, value, _, mask = inputs
    key, value = key[:, :key_heads], value[:, :key_heads]
    rows = [0, 2, 3, 19, tokens + 2]
    weights = attention_weights(query, key, pattern, mask, rows=torch.tensor(rows))
    assert weights.shape == (2, 4, 5, 3 + tokens)
    assert (weights >= 0).all()
    assert not weights[~mask[:, None, None].bool().expand_as(weights)].any()
    expected = lsg_attention(query, key, value, pattern, mask, implementation="reference")[:, :, rows]
    group = 4 // key_heads
    torch.testing.assert_close(weights @ value.repeat_interleave(group, 1), expected)


@pytest.mark.parametrize(
    ("rows", "error"),
    [([0, 40], ValueError), ([-1], ValueError), ([], TypeError), ([0.5], TypeError), ("ab", TypeError)],
)
def test_rows_are_positions(rows, error):
    x = torch.randn(1, 2, 40, 4)
    with pytest.raises(error, match="rows: expected"):
        attention_weights(x, x, SHORT, rows=rows)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_marked_tokens_in_front_are_the_patterns_globals(sparsity_type):
    """Blocks of the same tokens, so that nothing but the place of the globals differs: they are padding there."""
    pattern = LSGPattern(8, 8, 2, sparsity_type, 2)
    inputs = make_inputs(2, 2, 60, 8, torch.float64, "right")
    marked = torch.zeros(2, 60, dtype=torch.bool)
    marked[:, [5, 33]] = True
    leaves = [x.requires_grad_() for x in inputs[:3]]
    got = with_global_positions(*leaves, pattern, marked, inputs.attention_mask)
    rows = [torch.cat([x[:, :, [5, 33]], x], 2) for x in leaves]
    mask = torch.cat([inputs.attention_mask[:, [5, 33]].bool(), inputs.attention_mask.bool() & ~marked], 1)
    out = lsg_attention(*rows, pattern, mask, implementation="reference")
    expected = out[:, :, 2:].clone()
    expected[:, :, [5, 33]] = out[:, :, :2]
    keep = inputs.attention_mask[:, None, :, None]
    torch.testing.assert_close(got * keep, expected * keep)
    grads = (torch.autograd.grad((x * inputs.dout * keep).sum(), leaves) for x in (got, expected))
    torch.testing.assert_close(*grads)


def test_marked_tokens_see_and_are_seen_by_all():
    """Against a dense mask; as many as a sequence marks, none too."""
    query, key, value = torch.randn(3, 3, 2, 50, 8, dtype=torch.float64)
    marked = torch.zeros(3, 50, dtype=torch.int64)
    marked[0, [0, 7, 49]] = marked[1, 20] = 1
    keep = torch.arange(50) < torch.tensor([[50], [44], [50]])
    got = with_global_positions(query, key, value, LSGPattern(8, 0, 0, "none", 3), marked, keep)
    block, is_global = torch.arange(50) // 8, marked.bool()
    near = (block[:, None] - block[None]).abs() <= 1
    visible = (near | is_global[:, None, :] | is_global[:, :, None]) & keep[:, None]
    expected = nn.functional.scaled_dot_product_attention(query, key, value, visible[:, None])
    torch.testing.assert_close(got * keep[:, None, :, None], expected * keep[:, None, :, None])


def test_errors_of_global_positions():
    x, marked = torch.randn(1, 2, 50, 8), torch.ones(1, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most num_global_tokens=2 tokens in a sequence, got 50"):
        with_global_positions(x, x, x, LSGPattern(num_global_tokens=2), marked)
    with pytest.raises(ValueError, match=r"global_attention_mask: expected shape \(batch, T\)"):
        with_global_positions(x, x, x, LSGPattern(), marked[:, 1:])
    with pytest.raises(ValueError, match="expected one that is not causal"):
        with_global_positions(x, x, x, LSGPattern(causal=True), marked)
    with pytest.raises(TypeError, match=r"global_attention_mask: expected a torch\.Tensor, got list"):
        with_global_positions(x, x, x, LSGPattern(), [1])
