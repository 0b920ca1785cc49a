"""What has to run with every supported Python and no more than the base requirements: the CPU path and the command."""

from importlib.metadata import entry_points

import pytest
import torch

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern
from lsg_attn.testing import assert_close, make_inputs, run_attention, run_reference


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_blockwise_code_equals_the_reference(sparsity_type):
    """Output and gradients, with padding and a last block that is not full."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, num_global_tokens=2)
    inputs = make_inputs(2, 4, 2 + 101, 8, padding="right", num_kept=2)
    expected = run_reference(inputs, pattern)
    for implementation in ("torch", "auto"):
        got = run_attention(inputs, pattern, implementation=implementation)
        assert list(got) == ["out", "dquery", "dkey", "dvalue"]
        for name, x in got.items():
            assert_close(name, x, expected[name].to(x.dtype))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_layer_equals_the_reference(sparsity_type):
    """Output and the gradients of its parameters, in float64, as the gradient of k_proj.bias is 0 up to rounding."""
    torch.manual_seed(0)
    layer = LSGAttention(32, 4, LSGPattern(16, 16, 4, sparsity_type)).double()
    hidden, dout = torch.randn(2, 2, 1 + 70, 32, dtype=torch.float64)
    results = {}
    for layer.implementation in ("auto", "reference"):
        out = layer(hidden)
        results[layer.implementation] = [out, *torch.autograd.grad(out, layer.parameters(), dout)]
    names = ["out", *(name for name, _ in layer.named_parameters())]
    for name, x, y in zip(names, results["auto"], results["reference"], strict=True):
        assert_close(name, x, y)


def test_the_command_draws_a_pattern(capsys):
    (command,) = entry_points(group="console_scripts", name="lsg-attn")
    command.load()(["pattern", "--tokens", "20", "--sparsity-type", "stride"])
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "stride: B=8, s=8, f=4, G=1"
    assert rows[0] == "G" * 21
    assert len(rows) == 22  # and the legend
