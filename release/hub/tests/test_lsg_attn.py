"""The kernel in this folder against its reference in float64: ``python -m pytest tests``, on a GPU if there is one."""

from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel

FOLDER = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative to the root mean square of what is expected

lsg = get_local_kernel(FOLDER)


def check(got, expected):
    """Compare tensors with those of the reference."""
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y).square().mean().sqrt() / y.square().mean().sqrt()
        assert error <= TOLERANCES[x.dtype]


def with_gradients(query, key, value, dout, *arguments, **options):
    """The output and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = lsg.lsg_attention(*leaves, *arguments, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def test_it_is_the_kernel_of_this_folder():
    assert Path(lsg.__file__).is_relative_to(FOLDER / "build")
    assert lsg.__name__.startswith("_lsg_attn_")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sparsity_type", lsg.SPARSITY_TYPES)
def test_attention(sparsity_type, dtype):
    """With padding, and a last block that is not full."""
    torch.manual_seed(0)
    pattern = lsg.LSGPattern(16, 16, 4, sparsity_type, num_global_tokens=2)
    inputs = torch.randn(4, 1, 4, 2 + 75, 16).to(DEVICE, dtype)
    mask = torch.ones(1, 2 + 75, dtype=torch.bool, device=DEVICE)
    mask[:, -9:] = False
    inputs[3, :, :, -9:] = 0  # of padded queries, nothing has a meaning
    got = with_gradients(*inputs, pattern, mask, implementation="triton" if DEVICE == "cuda" else "auto")
    expected = with_gradients(*inputs.double(), pattern, mask, implementation="reference")
    kept = mask[:, None, :, None]
    check([got[0] * kept, *got[1:]], [expected[0] * kept, *expected[1:]])


def test_packed_sequences():
    torch.manual_seed(0)
    pattern = lsg.LSGPattern(16, 16, 4, num_global_tokens=1)
    ends = torch.tensor([0, 50, 51, 120], dtype=torch.int32, device=DEVICE)
    query, key, value = inputs = torch.randn(3, 120, 2, 16).to(DEVICE)
    out = lsg.lsg_attention_varlen(query, key, value, ends, 69, pattern)
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = inputs[:, None, start:stop].transpose(2, 3).double()
        expected = lsg.lsg_attention(*alone, pattern, implementation="reference")
        check([out[None, start:stop]], [expected.transpose(1, 2)])


def test_layer():
    """The output and the gradient of each parameter."""
    torch.manual_seed(0)
    layer = lsg.LSGAttention(32, 2, lsg.LSGPattern(16, 16, 4)).to(DEVICE)
    hidden, dout = torch.randn(2, 2, 1 + 70, 32).to(DEVICE)
    results = []
    for dtype, layer.implementation in ((torch.float32, "auto"), (torch.float64, "reference")):
        layer.to(dtype)
        out = layer(hidden.to(dtype))
        weights = [x for name, x in layer.named_parameters() if name != "k_proj.bias"]  # whose gradient is 0
        results.append([out, *torch.autograd.grad(out, weights, dout.to(dtype))])
    check(*results)


def test_compiled():
    """One graph, in which a call is one operator of this package's own."""
    torch.manual_seed(0)
    pattern = lsg.LSGPattern(16, 16, 4)
    inputs = torch.randn(3, 1, 2, 1 + 40, 16).to(DEVICE)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *x: lsg.lsg_attention(*x, pattern), backend=backend, fullgraph=True)
    check([compiled(*inputs)], [lsg.lsg_attention(*inputs.double(), pattern, implementation="reference")])
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if "lsg_attn" in str(node.target)]
    assert targets == [f"{lsg.__name__}.attention"]
