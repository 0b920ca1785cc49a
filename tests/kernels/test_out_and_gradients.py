"""The attention kernels against the reference in float64: out, log-sum-exp and the three gradients."""

import pytest
import recordings
import torch
from comparing import GRADIENTS, assert_equals_reference, assert_forward_equals, assert_same_bits, check
from running import (
    DEVICE,
    DTYPES,
    UNUSUAL_PATTERNS,
    attend,
    call_of,
    forward,
    name_of,
    padded_inputs,
    to_double,
    unusual_inputs,
    use_parts_of,
)
from strategies import AWKWARD_SHAPES
from torch.utils.checkpoint import checkpoint

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention
from lsg_attn.fused import variant
from lsg_attn.testing import TOLERANCES, Inputs, assert_close, make_inputs, run_reference

LONG_SHAPES = [  # (tokens, head_dim, num_global_tokens, padding) for blocks of B = 32: T = 2B+1, 7B-3, 9B
    (65, 40, 130, "middle"),
    (7 * 32 - 3, 128, 1, "left"),
    (7 * 32 - 3, 64, 0, "random"),
    (65, 128, 17, "right"),
    (7 * 32 - 3, 40, 17, "middle"),
    (9 * 32, 64, 1, "right"),
]
# (type, dtype, *shape) for each type and shape except a single token. Each dtype gets two shapes of six.
CASES = dict.fromkeys(
    (sparsity_type, DTYPES[(i + j) % 3], *shape)
    for i, sparsity_type in enumerate(SPARSITY_TYPES)
    for shapes in (AWKWARD_SHAPES, LONG_SHAPES)
    for j, shape in enumerate(shapes)
    if shape[0] > 1
)


@pytest.mark.parametrize(("sparsity_type", "dtype", "tokens", "head_dim", "num_globals", "padding"), CASES)
def test_each_type_dtype_and_shape(sparsity_type, dtype, tokens, head_dim, num_globals, padding):
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals)
    check(padded_inputs(pattern, tokens, head_dim, dtype, padding), pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_single_token(sparsity_type, dtype):
    """It sees itself alone, so that the gradients of query and key are 0 except for rounding errors."""
    pattern = LSGPattern(32, 32, 4, sparsity_type, 0)
    inputs = padded_inputs(pattern, 1, 24, dtype, "none")
    expected = run_reference(inputs, pattern)
    got = attend(inputs, pattern)
    assert_forward_equals(got, expected["out"], inputs, pattern)
    assert_close("dvalue", got.dvalue.cpu(), expected["dvalue"])
    size = got.dvalue.float().square().mean().sqrt()
    for x in (got.dquery, got.dkey):
        assert x.float().square().mean().sqrt() <= TOLERANCES[dtype] * size


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_gradients_of_the_log_sum_exp(sparsity_type):
    """Beside those of out; lse's gradient is a slice, whose rows do not follow each other, and 0 for padding."""
    pattern = LSGPattern(32, 32, 4, sparsity_type, 2)
    inputs = padded_inputs(pattern, 150, 24, torch.float32, "ends")
    dlse = torch.randn(*inputs.query.shape[:3], 2, generator=torch.Generator().manual_seed(0))
    dlse = (dlse * inputs.attention_mask[:, None, :, None])[..., 0]
    got = attend(inputs, pattern, dlse=dlse)
    *leaves, dout, mask = to_double(inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = lsg_attention(*leaves, pattern, mask, implementation="reference", return_lse=True)
    loss = (out * dout).sum() + (lse.masked_fill(lse.isinf(), 0) * dlse).sum()
    rows = mask[:, None, :, None]
    for name, x in zip(("dquery", "dkey", "dvalue"), torch.autograd.grad(loss, leaves), strict=True):
        assert_close(name, getattr(got, name).cpu() * rows, x * rows)


@pytest.mark.every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_blocks_as_large_as_a_tile(sparsity_type, dtype):
    """The default pattern, and all kernels. The first and last tokens of a window are padding."""
    pattern = LSGPattern(sparsity_type=sparsity_type)
    check(padded_inputs(pattern, 5 * 128 - 60, 64, dtype, "ends"), pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sparsity_type", "padding"), [("norm", "ends"), ("pooling", "middle"), ("stride", "ends")])
def test_windows_that_end_within_a_block(sparsity_type, padding, dtype):
    """s f is no multiple of B, though tiles lie in one block each."""
    pattern = LSGPattern(64, 16, 2, sparsity_type, 1)
    check(padded_inputs(pattern, 6 * 64 - 3, 40, dtype, padding), pattern)


@pytest.mark.parametrize("pattern", UNUSUAL_PATTERNS, ids=name_of)
def test_unusual_patterns(pattern):
    """Windows that do not end with a block's slots, tiles that span many blocks, chunks that are not a block."""
    check(unusual_inputs(pattern), pattern)


@pytest.mark.parametrize("path", recordings.PATHS, ids=lambda path: path.stem)
def test_equals_the_recording(path):
    """The results of the original, lsg-converter 0.1.9."""
    pattern, inputs, directions, results = recordings.load(path)
    got = attend(inputs, pattern, directions=directions)
    for name in ("out", *GRADIENTS):
        assert_close(name, getattr(got, name).cpu(), results[name])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float16), (16, torch.float32), (200, torch.bfloat16), (256, torch.float16), (256, torch.float32)],
)
def test_smallest_and_largest_head_dims(head_dim, dtype):
    pattern = LSGPattern(16, 16, 4, "pooling")
    check(padded_inputs(pattern, 100, head_dim, dtype, "right"), pattern)


@pytest.mark.parametrize("scale", [1e-3, 1.7])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_scales(scale, padding):
    """There are no globals, so that some rows see nothing of the first tiles."""
    check(make_inputs(1, 2, 130, 16, padding=padding, garbage=1e3), LSGPattern(16, 16, 4, "stride", 0), scale=scale)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_large_scale(padding):
    """Probabilities are 0 or 1 here, so that the gradients of queries and keys are mostly rounding errors."""
    pattern, scale = LSGPattern(16, 16, 4, "stride", 0), 40.0
    inputs = make_inputs(1, 2, 130, 16, padding=padding, garbage=1e3)
    expected = run_reference(inputs, pattern, scale=scale)["out"]
    assert_forward_equals(forward(inputs, pattern, scale=scale), expected, inputs, pattern, scale)


@pytest.mark.parametrize(
    "sizes", [(1 << 30, 0, 0, "none"), (16, (1 << 31) - 1, 4, "pooling"), (16, 1 << 28, 8, "stride")]
)
def test_sizes_beyond_any_sequence(sizes):
    check(make_inputs(1, 1, 1 + 59, 16), LSGPattern(*sizes))


@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling", "stride", "block_stride"])
def test_offsets_of_64_bits(sparsity_type, monkeypatch):
    """The kernels for heads of a tensor that span more than 2^31 elements, on a smaller one."""
    monkeypatch.setattr(variant, "_INT32", 0)
    pattern = LSGPattern(16, 32, 4, sparsity_type, 3)
    assert variant.variant_of(call_of(unusual_inputs(pattern), pattern)).is_wide
    check(unusual_inputs(pattern), pattern)


@pytest.mark.parametrize("shape", [(0, 2, 40, 16), (1, 2, 3, 16), (1, 1, 4, 16)])
def test_empty_batch_and_globals_alone(shape):
    check(make_inputs(*shape), LSGPattern(16, num_global_tokens=3))


def test_many_parts_of_the_globals(monkeypatch):
    """There are more parts than the combine takes at once, and some keep nothing."""
    use_parts_of(16, monkeypatch)
    inputs = make_inputs(1, 2, 2 + 40 * 16, 16)
    inputs.attention_mask[:, 16 * 7 : 16 * 9] = False
    check(inputs, LSGPattern(64, num_global_tokens=2, sparsity_type="none"))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_queries_that_see_nothing_and_keys_that_nothing_sees(sparsity_type):
    """One sequence is all padding. In the other, the first blocks see only padding."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 2, 3 + 200, 16, torch.float16)
    inputs.attention_mask[0] = False
    inputs.attention_mask[1, : 3 + 160] = False
    got = attend(inputs, pattern)
    assert_equals_reference(got, inputs, pattern)
    assert not got.out[0].any()
    assert (got.lse[0] == torch.inf).all()
    assert not got.out[1, :, 3:19].any()
    assert (got.lse[1, :, 3:19] == torch.inf).all()
    for x in (got.dquery, got.dkey, got.dvalue):
        assert not x[0].any()
    for x in (got.dkey, got.dvalue):  # padding has no gradient, whatever it holds
        assert not x[1, :, : 3 + 160].any()


@pytest.mark.parametrize("sparsity_type", ["stride", "norm"])
def test_masks_of_any_length_type_and_strides(sparsity_type):
    """A mask covers the tokens or all positions. No mask means that all are tokens."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 1, 3 + 60, 16, padding="random", num_kept=3)
    expected = attend(inputs, pattern)
    mask = inputs.attention_mask.to(DEVICE)
    wide = torch.zeros(2, 63, 2, dtype=torch.int64, device=DEVICE)
    wide[..., 0] = mask * 7
    for same in (mask[:, 3:], mask.int(), wide[..., 0], mask.t().contiguous().t()):
        assert_same_bits(attend(inputs, pattern, attention_mask=same), expected)
    ones = inputs._replace(attention_mask=torch.ones_like(inputs.attention_mask))
    assert_equals_reference(attend(inputs, pattern, attention_mask=None), ones, pattern)


@pytest.mark.parametrize("sparsity_type", ["pooling", "bos_pooling"])
def test_strides_of_one_kernel_change_no_bit(sparsity_type):
    """Triton compiles one kernel for all strides that are multiples of 16, if the last is 1."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = on_the_device(make_inputs(2, 2, 3 + 90, 16, padding="right"))
    query, key, value, dout, _ = inputs
    strided = inputs._replace(
        query=query.transpose(1, 2).contiguous().transpose(1, 2),
        key=torch.cat([key, key], -1)[..., :16],
        value=value.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        dout=dout.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_same_bits(attend(strided, pattern), attend(inputs, pattern))
    head = query[:, :1]
    expanded, repeated = (inputs._replace(query=x) for x in (head.expand_as(query), head.repeat(1, 2, 1, 1)))
    assert_same_bits(attend(expanded, pattern), attend(repeated, pattern))


@pytest.mark.parametrize("sparsity_type", ["pooling", "bos_pooling"])
def test_strides_of_other_kernels(sparsity_type):
    """Out is stored as a projection wants it. Gradients have the strides of the inputs if those are dense.

    Bits may differ from those for contiguous inputs, as another kernel may sum in another order.
    """
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 2, 3 + 90, 16, padding="right")
    query, key, value, dout, mask = on_the_device(inputs)
    strided = Inputs(
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([key, key], -1)[..., 0],
        value.mT.contiguous().mT,
        dout.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        mask,
    )
    got = attend(strided, pattern)
    assert_equals_reference(got, inputs, pattern)
    assert got.out.transpose(1, 2).is_contiguous()
    for name, x in zip(GRADIENTS, strided, strict=False):
        assert getattr(got, name).stride() == torch.empty_like(x).stride()
    expanded = strided._replace(dout=torch.ones((), device=DEVICE).expand_as(dout))
    ones = inputs._replace(dout=torch.ones_like(inputs.dout))
    assert_equals_reference(attend(expanded, pattern), ones, pattern)


def on_the_device(inputs):
    """The inputs on the GPU, where they get their strides: a copy to it would not keep them."""
    return Inputs(*(x.to(DEVICE) for x in inputs))


@pytest.mark.parametrize("sparsity_type", ["norm", "pooling", "bos_pooling", "lsh"])
def test_the_same_bits_again(sparsity_type):
    inputs = make_inputs(2, 2, 3 + 150, 16, torch.float16, padding="random")
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    first, again = (attend(inputs, pattern, dropout_p=0.1, seed=5) for _ in range(2))
    assert_same_bits(again, first)


@pytest.mark.parametrize("sparsity_type", ["none", "stride", "block_stride", "pooling", "bos_pooling"])
def test_gradients_are_the_slopes_of_out(sparsity_type):
    """By differences of the kernels' out a step to either side of the inputs."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(1, 2, 3 + 90, 16, padding="random", num_kept=4)
    options = {"dropout_p": 0.2, "seed": 7}
    steps = make_inputs(1, 2, 3 + 90, 16, seed=1)[:3]
    _, _, *gradients = attend(inputs, pattern, **options)
    for i, (gradient, step) in enumerate(zip(gradients, steps, strict=True)):
        sums = []
        for size in (-1e-2, 1e-2):
            moved = [x + size * step if i == j else x for j, x in enumerate(inputs[:3])]
            out = forward(Inputs(*moved, *inputs[3:]), pattern, **options).out
            sums.append((out.cpu().double() * inputs.dout).sum().item())
        slope = (gradient.cpu().double() * step).sum().item()
        assert (sums[1] - sums[0]) / 2e-2 == pytest.approx(slope, rel=1e-3)


def on_device(inputs):
    """The inputs on the GPU, the first three as leaves."""
    *qkv, dout, mask = (x.to(DEVICE) for x in inputs)
    return [x.detach().requires_grad_() for x in qkv], dout, mask


def assert_runs_as(run, inputs, expected):
    """Compare out and gradients of a function of query, key and value with those of ``expected``, bit for bit."""
    leaves, dout, _ = on_device(inputs)
    out = run(*leaves)
    out.backward(dout)
    assert torch.equal(out, expected.out)
    for name, x in zip(GRADIENTS, leaves, strict=True):
        assert torch.equal(x.grad, getattr(expected, name)), name


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_lsg_attention_runs_the_kernels(sparsity_type):
    """Its "auto" chooses them, also under checkpointing of both kinds."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3, lsh_seed=5)
    inputs = make_inputs(2, 2, 3 + 90, 16, torch.float16, "right", num_kept=3)
    mask = inputs.attention_mask.to(DEVICE)
    expected = attend(inputs, pattern, scale=0.4)
    assert_equals_reference(expected, inputs, pattern, scale=0.4)
    assert_close("out of padding too", expected.out.cpu(), run_reference(inputs, pattern, scale=0.4)["out"])

    def call(query, key, value):
        return lsg_attention(query, key, value, pattern, mask, scale=0.4)

    for run in (
        call,
        lambda *x: checkpoint(call, *x, use_reentrant=False),
        lambda *x: checkpoint(call, *x, use_reentrant=True),
    ):
        assert_runs_as(run, inputs, expected)


def test_manual_seed_decides_what_is_dropped():
    """The backward drops the same as the forward, and the second forward of a checkpoint the same as the first."""
    pattern = LSGPattern(16, num_global_tokens=3)
    inputs = make_inputs(1, 2, 3 + 60, 16)
    torch.manual_seed(1)
    seed = int(torch.randint(1 << 62, ()))
    expected = attend(inputs, pattern, attention_mask=None, dropout_p=0.5, seed=seed)

    def drop(query, key, value, implementation="auto"):
        return lsg_attention(query, key, value, pattern, dropout_p=0.5, implementation=implementation)

    for run in (
        drop,
        lambda *x: drop(*x, implementation="triton"),
        lambda *x: checkpoint(drop, *x, use_reentrant=True),
    ):
        torch.manual_seed(1)
        assert_runs_as(run, inputs, expected)
    torch.manual_seed(2)
    assert not torch.equal(drop(*on_device(inputs)[0]), expected.out)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_autograd_saves_only_lse_and_the_choice(sparsity_type):
    """Bytes besides q, k, v, out and the mask: lse, and the compression's choice."""
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


def test_second_derivative_is_an_error():
    """Not a gradient with a term missing."""
    leaves, dout, mask = on_device(make_inputs(1, 1, 3 + 40, 16))
    out = lsg_attention(*leaves, LSGPattern(16, num_global_tokens=3), mask)
    (dquery,) = torch.autograd.grad(out, leaves[0], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="use implementation='reference'"):
        dquery.sum().backward()


@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])
def test_losses_of_training_equal_the_references(sparsity_type):
    """20 steps of a tiny layer. What "norm" chooses changes on the way, about fifty times."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 2)
    (losses, _), (expected, gap) = (train(pattern, implementation) for implementation in ("triton", "reference"))
    if sparsity_type == "norm":
        assert gap > 1e-4  # a hundred times what rounding changes a weight by; else try another seed
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


def train(pattern, implementation):
    """The losses of a layer that learns to copy its input, shifted by 40 tokens, and the smallest :func:`gap_of`."""
    torch.manual_seed(13)
    layer = LSGAttention(32, 2, pattern, implementation=implementation).to(DEVICE)
    hidden = torch.randn(2, 2 + 75, 32).to(DEVICE)
    mask = torch.ones(2, 2 + 75, dtype=torch.bool, device=DEVICE)
    mask[1, 60:] = False
    # The gradient of the keys' bias is a rounding error, of 1e-9. With AdamW's own eps of 1e-8 it moves that bias by
    # 1e-3, and with it the norms.
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, eps=1e-5)
    losses, gaps = [], []
    for _ in range(20):
        gaps.append(gap_of(layer.project(hidden)[1], pattern, mask))
        optimizer.zero_grad()
        loss = (layer(hidden, mask) - hidden.roll(40, 1)).square()[mask].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, min(gaps)


def gap_of(key, pattern, mask):
    """How much larger, as a ratio, the last norm that "norm" keeps in a chunk is than the next: the least of all."""
    kept, chunk = pattern.chunk // pattern.sparsity_factor, pattern.chunk
    norms = (key.detach().norm(dim=-1) * mask[:, None])[:, :, pattern.num_global_tokens :]
    chunks = torch.nn.functional.pad(norms, (0, -norms.shape[-1] % chunk)).unflatten(-1, (-1, chunk))
    ranked = chunks.sort(-1, descending=True).values
    ratio = ranked[..., kept - 1] / ranked[..., kept]  # of padding and nothing, NaN
    return ratio.nan_to_num(torch.inf).min().item() - 1
