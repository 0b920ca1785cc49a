"""The backward kernels against the reference in float64, on inputs whose padding holds garbage."""

import pytest
import recordings
import torch
from running import (
    DEVICE,
    DTYPES,
    UNUSUAL_PATTERNS,
    backward,
    default_inputs,
    each_type_and_dtype,
    forward,
    name_of,
    padded_inputs,
    unusual_inputs,
)
from torch.utils.checkpoint import checkpoint

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention
from lsg_attn.fused import launch
from lsg_attn.testing import Inputs, assert_close, make_inputs, run_reference

NAMES = ("dquery", "dkey", "dvalue")
SHAPES = [  # (tokens, head_dim, num_global_tokens, padding) for blocks of B = 32: T = 2B+1, 7B-3, 9B
    (65, 40, 130, "middle"),
    (7 * 32 - 3, 128, 1, "left"),
    (7 * 32 - 3, 64, 0, "random"),
    (65, 128, 17, "right"),
    (7 * 32 - 3, 40, 17, "middle"),
    (9 * 32, 64, 1, "right"),
]


def check(inputs, pattern, scale=None):
    """The globals' gradients, sums over all positions, by themselves: large ones must not hide the others' errors."""
    first = pattern.num_global_tokens
    expected = run_reference(inputs, pattern, scale=scale)
    for name, got in zip(NAMES, backward(inputs, pattern, scale=scale), strict=True):
        for rows, part in (("tokens", slice(first, None)), ("globals", slice(0, first))):
            assert_close(f"{name} of {rows}", got[:, :, part].cpu(), expected[name][:, :, part])


@pytest.mark.parametrize(
    ("sparsity_type", "dtype", "tokens", "head_dim", "num_globals", "padding"), each_type_and_dtype(SHAPES)
)
def test_each_type_and_dtype(sparsity_type, dtype, tokens, head_dim, num_globals, padding):
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals)
    check(padded_inputs(pattern, tokens, head_dim, dtype, padding), pattern)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_blocks_as_large_as_a_tile(sparsity_type):
    pattern = LSGPattern(sparsity_type=sparsity_type)
    check(default_inputs(pattern), pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sparsity_type", "padding"), [("norm", "ends"), ("pooling", "middle"), ("stride", "ends")])
def test_windows_that_end_within_a_block(sparsity_type, padding, dtype):
    """s f is no multiple of B, though tiles lie in one block each."""
    pattern = LSGPattern(64, 16, 2, sparsity_type, 1)
    check(padded_inputs(pattern, 6 * 64 - 3, 40, dtype, padding), pattern)


@pytest.mark.parametrize(
    "sizes", [(1 << 30, 0, 0, "none"), (16, (1 << 31) - 1, 4, "pooling"), (16, 1 << 28, 8, "stride")]
)
def test_sizes_that_mean_no_limit(sizes):
    check(make_inputs(1, 1, 1 + 59, 16), LSGPattern(*sizes))


@pytest.mark.parametrize("pattern", UNUSUAL_PATTERNS, ids=name_of)
def test_unusual_patterns(pattern):
    """Windows that do not end with a block's slots, tiles that span many blocks, chunks that are not a block."""
    check(unusual_inputs(pattern), pattern)


@pytest.mark.parametrize("path", recordings.PATHS, ids=lambda path: path.stem)
def test_recording(path):
    """What the original gave (lsg-converter 0.1.9)."""
    pattern, inputs, directions, results = recordings.load(path)
    for name, got in zip(NAMES, backward(inputs, pattern, directions=directions), strict=True):
        assert_close(name, got.cpu(), results[name])


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(1, torch.float16), (200, torch.bfloat16), (256, torch.float16), (256, torch.float32)]
)
def test_head_dims(head_dim, dtype):
    pattern = LSGPattern(16, 16, 4, "pooling")
    check(padded_inputs(pattern, 100, head_dim, dtype, "right"), pattern)


@pytest.mark.parametrize("scale", [1e-3, 1.7])
def test_scales(scale):
    """Without globals, so that some rows see nothing of the first tiles."""
    inputs = make_inputs(1, 2, 130, 16, padding="left", garbage=1e3)
    check(inputs, LSGPattern(16, 16, 4, "stride", 0), scale=scale)


@pytest.mark.parametrize("sparsity_type", ["none", "stride", "block_stride", "pooling", "bos_pooling"])
def test_differences(sparsity_type):
    """The kernels' forward a step to either side of the inputs: its slope is what their backward says."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(1, 2, 3 + 90, 16, padding="random", num_kept=4)
    options = {"dropout_p": 0.2, "seed": 7}
    steps = make_inputs(1, 2, 3 + 90, 16, seed=1)[:3]
    gradients = backward(inputs, pattern, **options)
    for i, (gradient, step) in enumerate(zip(gradients, steps, strict=True)):
        sums = []
        for size in (-1e-2, 1e-2):
            moved = [x + size * step if i == j else x for j, x in enumerate(inputs[:3])]
            out = forward(Inputs(*moved, *inputs[3:]), pattern, **options).out
            sums.append((out.cpu().double() * inputs.dout).sum().item())
        slope = (gradient.cpu().double() * step).sum().item()
        assert (sums[1] - sums[0]) / 2e-2 == pytest.approx(slope, rel=1e-3)


def test_strides():
    """Inputs and an incoming gradient of any strides; gradients with the inputs' strides where those are dense."""
    pattern = LSGPattern(16, 16, 4, "bos_pooling", 3)
    # on the device before they get their strides, as a copy to it would not keep them
    inputs = Inputs(*(x.to(DEVICE) for x in make_inputs(2, 2, 3 + 90, 16, padding="right")))
    expected = backward(inputs, pattern)
    query, key, value, dout, mask = inputs
    strided = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([key, key], -1)[..., 0],
        value.mT.contiguous().mT,
        dout.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    )
    got = backward(Inputs(*strided, mask), pattern, dout=strided[3])
    for x, y, gradient in zip(expected, got, strided, strict=False):
        assert torch.equal(x, y)
        assert y.stride() == torch.empty_like(gradient).stride()
    ones = torch.ones((), device=DEVICE).expand_as(dout)
    for x, y in zip(backward(inputs, pattern, dout=ones), backward(inputs, pattern, dout=ones.clone()), strict=True):
        assert torch.equal(x, y)


def test_masks():
    """Of the tokens or of all positions, of any integer type, and none where all are tokens."""
    pattern = LSGPattern(16, 16, 4, "norm", 3)
    inputs = make_inputs(2, 1, 3 + 60, 16, padding="random", num_kept=3)
    expected = backward(inputs, pattern)
    mask = inputs.attention_mask.to(DEVICE)
    for same in (mask[:, 3:], mask.int()):
        assert all(map(torch.equal, backward(inputs, pattern, attention_mask=same), expected))
    exact = run_reference(inputs._replace(attention_mask=torch.ones_like(inputs.attention_mask)), pattern)
    for name, got in zip(NAMES, backward(inputs, pattern, attention_mask=None), strict=True):
        assert_close(name, got.cpu(), exact[name])


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_what_nothing_sees_has_no_gradient(sparsity_type):
    """Everything is padding in one sequence; in the other, all that the first blocks and their slots see."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 2, 3 + 200, 16, torch.float16)
    inputs.attention_mask[0] = False
    inputs.attention_mask[1, : 3 + 160] = False
    expected = run_reference(inputs, pattern)
    for name, got in zip(NAMES, backward(inputs, pattern), strict=True):
        assert not got[0].any()
        assert_close(name, got.cpu(), expected[name])
        if name != "dquery":  # padding has none, whatever it holds
            assert not got[1, :, : 3 + 160].any()


@pytest.mark.parametrize("shape", [(0, 2, 40, 16), (1, 2, 3, 16), (1, 1, 4, 16)])
def test_nothing_or_globals_alone(shape):
    check(make_inputs(*shape), LSGPattern(16, num_global_tokens=3))


def test_many_parts_of_the_globals(monkeypatch):
    """More parts than the combine takes at once, and some in which nothing is kept."""
    monkeypatch.setattr(launch, "_PART", 16)
    inputs = make_inputs(1, 2, 2 + 40 * 16, 16)
    inputs.attention_mask[:, 16 * 7 : 16 * 9] = False
    check(inputs, LSGPattern(64, num_global_tokens=2, sparsity_type="none"))


@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling", "lsh"])
def test_the_same_bits_again(sparsity_type):
    inputs = make_inputs(2, 2, 3 + 150, 16, torch.float16, padding="random")
    first, again = (backward(inputs, LSGPattern(16, 16, 4, sparsity_type, 3), dropout_p=0.1, seed=5) for _ in range(2))
    assert all(map(torch.equal, first, again))


def on_device(inputs):
    """The inputs on the GPU, the first three as leaves."""
    *qkv, dout, mask = (x.to(DEVICE) for x in inputs)
    return [x.detach().requires_grad_() for x in qkv], dout, mask


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_as_callers_call_it(sparsity_type):
    """By lsg_attention, whose "auto" takes the kernels, and by checkpointing of both kinds."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3, lsh_seed=5)
    inputs = make_inputs(2, 2, 3 + 90, 16, torch.float16, "right", num_kept=3)
    expected = backward(inputs, pattern, scale=0.4)

    def attend(query, key, value):
        return lsg_attention(query, key, value, pattern, mask, scale=0.4)

    for run in (
        attend,
        lambda *x: checkpoint(attend, *x, use_reentrant=False),
        lambda *x: checkpoint(attend, *x, use_reentrant=True),
    ):
        leaves, dout, mask = on_device(inputs)
        run(*leaves).backward(dout)
        assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))


def test_dropout_as_callers_call_it():
    """The backward drops what the forward did, and a checkpoint's second forward what its first did."""
    pattern = LSGPattern(16, num_global_tokens=3)
    inputs = make_inputs(1, 2, 3 + 60, 16)
    torch.manual_seed(1)
    seed = int(torch.randint(1 << 62, ()))
    expected = backward(inputs, pattern, attention_mask=None, dropout_p=0.5, seed=seed)

    def drop(query, key, value):
        return lsg_attention(query, key, value, pattern, dropout_p=0.5)

    for run in (drop, lambda *x: checkpoint(drop, *x, use_reentrant=True)):
        leaves, dout, _ = on_device(inputs)
        torch.manual_seed(1)
        run(*leaves).backward(dout)
        assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_what_is_saved(sparsity_type):
    """Bytes besides q, k, v, out and the mask: lse, and of the compression what it chose."""
    heads, tokens, head_dim, factor = 4, 96, 16, 4
    pattern = LSGPattern(16, 16, factor, sparsity_type, 3)
    leaves, _, mask = on_device(make_inputs(2, heads, 3 + tokens, head_dim, torch.bfloat16))
    saved = {}

    def save(x):
        saved[x.data_ptr()] = x.nbytes  # of no memory, 0
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        out = lsg_attention(*leaves, pattern, mask)
    choice = {"norm": 4 * 2 * heads * tokens // factor, "lsh": 4 * 2 * heads * tokens}
    lse = 4 * 2 * heads * (3 + tokens)
    assert sum(saved.values()) == 4 * out.nbytes + mask.nbytes + lse + choice.get(sparsity_type, 0)


def test_no_second_derivative():
    """An error, not a gradient that leaves something out."""
    leaves, dout, mask = on_device(make_inputs(1, 1, 3 + 40, 16))
    out = lsg_attention(*leaves, LSGPattern(16, num_global_tokens=3), mask)
    (dquery,) = torch.autograd.grad(out, leaves[0], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dquery.sum().backward()


@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])
def test_training(sparsity_type):
    """20 steps of a tiny layer: the same losses as the reference's."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 2)
    losses = {implementation: train(pattern, implementation) for implementation in ("triton", "reference")}
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["triton"][-1] < 0.8 * losses["triton"][0]


def train(pattern, implementation):
    """The losses of a run that learns to copy the layer's input, shifted by 40 tokens."""
    torch.manual_seed(0)
    layer = LSGAttention(32, 2, pattern, implementation=implementation).to(DEVICE)
    hidden = torch.randn(2, 2 + 75, 32).to(DEVICE)
    mask = torch.ones(2, 2 + 75, dtype=torch.bool, device=DEVICE)
    mask[1, 60:] = False
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(hidden, mask) - hidden.roll(40, 1)).square()[mask].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
