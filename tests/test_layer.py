"""LSGAttention as users meet it."""

import copy

import pytest
import torch
from strategies import IMPLEMENTATIONS
from torch import nn

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention

PATTERN = LSGPattern(8, 8, 2, num_global_tokens=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_is_four_projections_around_lsg_attention(implementation, bias):
    layer = LSGAttention(12, 3, PATTERN, bias=bias, implementation=implementation)
    x = torch.randn(2, 2 + 45, 12)
    mask = torch.rand(2, 45) < 0.7
    q, k, v = (
        nn.functional.linear(x, proj.weight, proj.bias).view(2, 47, 3, 4).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = lsg_attention(q, k, v, PATTERN, mask, implementation=implementation)
    expected = layer.out_proj(out.transpose(1, 2).reshape(2, 47, 12))
    torch.testing.assert_close(layer(x, mask), expected)


def test_takes_the_place_of_dense_attention_where_all_see_all():
    """Weights of nn.MultiheadAttention give its output in a short sequence."""
    dense = nn.MultiheadAttention(12, 3, batch_first=True)
    layer = LSGAttention(12, 3, PATTERN)
    weights, biases = dense.in_proj_weight.chunk(3), dense.in_proj_bias.chunk(3)
    for proj, weight, bias in zip((layer.q_proj, layer.k_proj, layer.v_proj), weights, biases, strict=True):
        proj.weight.data, proj.bias.data = weight.data, bias.data
    layer.out_proj.load_state_dict(dense.out_proj.state_dict())
    x = torch.randn(2, 2 + 16, 12)
    torch.testing.assert_close(layer(x), dense(x, x, x, need_weights=False)[0])


def test_state_dict_has_barts_names():
    names = {f"{proj}.{what}" for proj in ("q_proj", "k_proj", "v_proj", "out_proj") for what in ("weight", "bias")}
    assert set(LSGAttention(8, 2).state_dict()) == names


def test_dropout_only_in_training():
    layer = LSGAttention(8, 2, PATTERN, dropout=0.5)
    x = torch.randn(1, 2 + 40, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_trains_as_the_reference_does(sparsity_type):
    """20 steps with the same seed: the same losses, and they fall."""
    torch.manual_seed(0)
    pattern = LSGPattern(8, 8, 4, sparsity_type, num_global_tokens=1)
    model = nn.Sequential(LSGAttention(16, 4, pattern, implementation="torch"), nn.Tanh(), nn.Linear(16, 1)).double()
    twin = copy.deepcopy(model)
    twin[0].implementation = "reference"
    x = torch.randn(2, 1 + 61, 16, dtype=torch.float64)
    target = x.roll(5, 1).sum(-1, keepdim=True).tanh()
    losses = []
    for net in (model, twin):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(20):
            loss = nn.functional.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_repr_names_the_pattern():
    assert "sparsity_type='norm'" in repr(LSGAttention(8, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_runs_under_autocast(implementation, sparsity_type):
    """Projections in bfloat16; attention in the dtype of what it is given, here float32 computed as without."""
    pattern = LSGPattern(8, 8, 2, sparsity_type, num_global_tokens=2)
    layer = LSGAttention(32, 2, pattern, implementation=implementation)
    x = torch.randn(1, 2 + 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        qkv = [torch.randn(1, 2, 42, 8) for _ in range(3)]
        inside = lsg_attention(*qkv, pattern, implementation=implementation)
    assert out.dtype == torch.bfloat16
    assert torch.equal(inside, lsg_attention(*qkv, pattern, implementation=implementation))
    if sparsity_type not in ("norm", "lsh"):  # whose choice can turn on the rounding of a key
        torch.testing.assert_close(out.float(), layer(x), rtol=0.1, atol=0.02)


def test_a_projection_without_a_weight_of_its_own():
    """As a wrapper has it that keeps the layer it wraps as a child."""

    class Wrapper(torch.nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, x):
            return self.wrapped(x)

    layer, x = LSGAttention(16, 2), torch.randn(1, 20, 16)
    expected = layer(x)
    layer.q_proj = Wrapper(layer.q_proj)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_compiles_as_one_graph_for_any_length(sparsity_type):
    """Head splitting and merging break no graph, and lengths after the first compile nothing."""
    pattern = LSGPattern(8, 8, 2, sparsity_type, num_global_tokens=2)
    layer = LSGAttention(12, 3, pattern)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (40, 61, 90):
        x = torch.randn(2, 2 + tokens, 12)
        with torch.compiler.set_stance("default" if tokens == 40 else "fail_on_recompile"):
            out = compiled(x)
        torch.testing.assert_close(out, layer(x))
