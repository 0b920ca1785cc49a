"""Properties that every implementation has."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AWKWARD_SHAPES, HEADS, IMPLEMENTATIONS, cases

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.testing import (
    PADDINGS,
    TOLERANCES,
    Inputs,
    assert_close,
    make_inputs,
    relative_rms,
    run_attention,
    run_reference,
)

F64 = torch.float64
HEAD_DIM = 5
sdpa = torch.nn.functional.scaled_dot_product_attention
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def inputs_of(case, batch=2, **options):
    _, length, padding = case
    return make_inputs(batch, HEADS, length, HEAD_DIM, F64, padding, **options)


def assert_all_close(got, expected, tolerance=1e-10):
    for name, x in expected.items():
        assert_close(name, got[name], x, tolerance)


@given(cases(causal=None))
@settings(max_examples=250)
def test_torch_equals_reference(case):
    inputs = inputs_of(case)
    assert_all_close(run_attention(inputs, case[0], implementation="torch"), run_reference(inputs, case[0]))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim", "num_global_tokens", "padding"), AWKWARD_SHAPES)
def test_errors_are_within_the_tolerance_of_each_dtype(
    sparsity_type, dtype, tokens, head_dim, num_global_tokens, padding
):
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_global_tokens)
    inputs = make_inputs(
        2, 4, tokens + num_global_tokens, head_dim, dtype, padding, garbage=1e3, num_kept=num_global_tokens + 1
    )
    expected = run_reference(inputs, pattern)
    for implementation in IMPLEMENTATIONS:
        got = run_attention(inputs, pattern, implementation=implementation)
        for name, x in expected.items():
            rows = inputs.attention_mask[:, None, :, None]  # the results of padded queries have no meaning
            assert_close(f"{implementation} {name}", got[name] * rows, x * rows)


@each_implementation
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_pass_gradcheck(implementation, sparsity_type, padding):
    pattern = LSGPattern(4, 4, 2, sparsity_type, num_global_tokens=2)
    inputs = make_inputs(1, 2, 2 + 13, 3, F64, padding)
    leaves = tuple(x.requires_grad_() for x in inputs[:3])

    def attend(query, key, value):
        return lsg_attention(query, key, value, pattern, inputs.attention_mask, implementation=implementation)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=False)


@each_implementation
@given(cases(types=("none", "norm", "pooling")))
def test_no_sparse_keys_is_local_attention(implementation, case):
    pattern, length, _ = case
    pattern = dataclasses.replace(pattern, sparse_block_size=0)
    inputs = inputs_of(case)
    first, size = pattern.num_global_tokens, pattern.block_size
    block = (torch.arange(length) - first).div(size, rounding_mode="floor")
    visible = (block[:, None] - block[None, :]).abs() <= 1
    visible[:first] = visible[:, :first] = True
    if length - first <= 2 * size:
        visible[:] = True
    visible = visible & inputs.attention_mask[:, None, None, :]
    expected = sdpa(*inputs[:3], attn_mask=visible).where(visible.any(-1, keepdim=True), torch.zeros((), dtype=F64))
    assert_close("out", run_attention(inputs, pattern, implementation=implementation)["out"], expected)


@each_implementation
@given(cases(causal=True), st.data())
def test_a_causal_pattern_sees_no_later_token(implementation, case, data):
    """New tokens from any position on change no earlier row, nor any global's, nor their gradients."""
    pattern, length, _ = case
    first = data.draw(st.integers(pattern.num_global_tokens, length - 1))
    inputs = inputs_of(case)
    changed = Inputs(*(torch.cat([x[:, :, :first], x[:, :, first:] * -3 + 1], dim=2) for x in inputs[:3]), *inputs[3:])
    changed.dout[:, :, first:] = 0
    inputs.dout[:, :, first:] = 0
    expected, got = (run_attention(x, pattern, implementation=implementation) for x in (inputs, changed))
    before = [{name: x[:, :, :first] for name, x in results.items()} for results in (got, expected)]
    assert_all_close(*before)
    assert not any(got[name][:, :, first:].any() for name in ("dquery", "dkey", "dvalue"))


@each_implementation
@given(cases(causal=True), st.integers(0, 9))
def test_short_causal_sequences_are_causal_dense_attention(implementation, case, cut):
    pattern, _, padding = case
    first = pattern.num_global_tokens
    length = first + max(2 * pattern.block_size - cut, 1)
    inputs = inputs_of((pattern, length, padding), num_kept=first + 1)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[:, :first] = True
    out = sdpa(*inputs[:3], attn_mask=visible & inputs.attention_mask[:, None, None, :])
    assert_close("out", run_attention(inputs, pattern, implementation=implementation)["out"], out)


@each_implementation
@given(cases(), st.integers(0, 9))
def test_short_sequences_are_dense_attention(implementation, case, cut):
    pattern, _, padding = case
    length = pattern.num_global_tokens + max(2 * pattern.block_size - cut, 1)
    inputs = inputs_of((pattern, length, padding), num_kept=1)
    got = run_attention(inputs, pattern, implementation=implementation)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = sdpa(*leaves, attn_mask=inputs.attention_mask[:, None, None, :])
    out.backward(inputs.dout)
    expected = {"out": out, "dquery": leaves[0].grad, "dkey": leaves[1].grad, "dvalue": leaves[2].grad}
    assert_all_close(got, expected)


@each_implementation
@pytest.mark.parametrize("sparsity_type", [t for t in SPARSITY_TYPES if t != "none"])
@pytest.mark.parametrize("tokens", [17, 30, 40])
def test_factor_one_and_a_long_reach_is_dense_attention(implementation, sparsity_type, tokens):
    """Each key is then seen exactly once, raw or as its own compressed key."""
    pattern = LSGPattern(8, 8 * 5, 1, sparsity_type, num_global_tokens=3)
    inputs = make_inputs(2, HEADS, 3 + tokens, HEAD_DIM, F64, "random", num_kept=1)
    expected = sdpa(*inputs[:3], attn_mask=inputs.attention_mask[:, None, None, :])
    assert_close("out", run_attention(inputs, pattern, implementation=implementation)["out"], expected)


@each_implementation
@given(cases(causal=None), st.integers(1, 20))
def test_padding_on_the_right_changes_nothing(implementation, case, extra):
    """Even if a short sequence, which is dense, becomes long enough for blocks."""
    pattern, length, _ = case
    inputs = inputs_of(case)
    longer = Inputs(
        *(torch.nn.functional.pad(x, (0, 0, 0, extra), value=1e3) for x in inputs[:3]),
        torch.nn.functional.pad(inputs.dout, (0, 0, 0, extra)),
        torch.nn.functional.pad(inputs.attention_mask, (0, extra), value=False),
    )
    got = run_attention(longer, pattern, implementation=implementation)
    expected = run_attention(inputs, pattern, implementation=implementation)
    assert_all_close({name: x[:, :, :length] for name, x in got.items()}, expected)
    for name in ("dquery", "dkey", "dvalue"):
        assert not got[name][:, :, length:].any()


@each_implementation
@given(cases(causal=None))
def test_permuting_the_batch_permutes_the_output(implementation, case):
    inputs = inputs_of(case, batch=3)
    order = torch.tensor([2, 0, 1])
    got = run_attention(Inputs(*(x[order] for x in inputs)), case[0], implementation=implementation)
    expected = run_attention(inputs, case[0], implementation=implementation)
    assert_all_close(got, {name: x[order] for name, x in expected.items()}, 1e-12)


@each_implementation
@given(cases(causal=None))
def test_rows_that_see_nothing_are_zero(implementation, case):
    pattern, length, _ = case
    inputs = inputs_of((pattern, length, "all"))  # the globals are masked too
    for name, x in run_attention(inputs, pattern, implementation=implementation).items():
        assert not x.any(), name


@each_implementation
@given(cases(causal=None))
def test_garbage_in_padding_never_matters(implementation, case):
    pattern, _, _ = case
    # bos_pooling weights by the first token's query, even if that is padding
    kept = pattern.num_global_tokens + 1 if pattern.compression == "bos_pooling" else 0
    clean, dirty = (inputs_of(case, garbage=garbage, num_kept=kept) for garbage in (1e-3, 1e3))
    rows = clean.attention_mask[:, None, :, None]
    expected = run_attention(clean, pattern, implementation=implementation)
    got = run_attention(dirty, pattern, implementation=implementation)
    assert_all_close(
        {name: x.masked_fill(~rows, 0) for name, x in got.items()},
        {name: x.masked_fill(~rows, 0) for name, x in expected.items()},
    )


@each_implementation
def test_lsh_repeats_with_its_seed(implementation):
    inputs = make_inputs(1, 4, 1 + 64, 8, F64)
    pattern = LSGPattern(8, 8, 2, "lsh")
    first, again = (run_attention(inputs, pattern, implementation=implementation)["out"] for _ in range(2))
    other = run_attention(inputs, dataclasses.replace(pattern, lsh_seed=1), implementation=implementation)["out"]
    assert torch.equal(first, again)
    assert relative_rms(other, first) > 1e-3


@each_implementation
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize(("tokens", "causal"), [(7, False), (17, False), (17, True)])
def test_dropout_is_the_same_in_backward(implementation, sparsity_type, tokens, causal):
    pattern = LSGPattern(4, 4, 2, sparsity_type, num_global_tokens=2, causal=causal)
    inputs = make_inputs(2, 2, 2 + tokens, 3, F64, "right")
    options = {"attention_mask": inputs.attention_mask, "dropout_p": 0.4, "implementation": implementation}

    def attend(query, key, value):
        torch.manual_seed(0)
        return lsg_attention(query, key, value, pattern, **options)

    assert torch.autograd.gradcheck(attend, tuple(x.requires_grad_() for x in inputs[:3]))


@each_implementation
def test_dropout_is_the_same_in_backward_on_other_threads(implementation, monkeypatch):
    """The number of threads may change between the forward and the backward."""
    # as many heads at a time as threads, as in a long sequence
    monkeypatch.setattr("lsg_attn.blockwise.sweep._CPU_SCORES", 1)
    pattern = LSGPattern(8, 8, 2)
    inputs = make_inputs(1, 8, 1 + 60, 4, F64)
    grads, threads = [], torch.get_num_threads()
    for threads_of_backward in (threads, threads + 1):
        query = inputs.query.clone().requires_grad_()
        torch.manual_seed(0)
        out = lsg_attention(query, *inputs[1:3], pattern, dropout_p=0.5, implementation=implementation)
        torch.set_num_threads(threads_of_backward)
        try:
            out.backward(inputs.dout)
        finally:
            torch.set_num_threads(threads)
        grads.append(query.grad)
    assert_close("dquery", grads[1], grads[0])


def test_default_device_of_the_caller_does_not_matter():
    """The directions of lsh and the seed of dropout are drawn on the CPU. The directions are kept between calls."""
    inputs = make_inputs(1, 2, 1 + 40, 4, F64)
    pattern = LSGPattern(8, 8, 2, "lsh", lsh_seed=77)  # a seed that no other test has cached
    with torch.device("meta"):
        inside = lsg_attention(*inputs[:3], pattern, implementation="torch")
        lsg_attention(*inputs[:3], pattern, implementation="torch", dropout_p=0.5)
    assert torch.equal(inside, lsg_attention(*inputs[:3], pattern, implementation="torch"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_large_scores_lose_no_more_than_in_the_plain_computation(dtype, sparsity_type):
    """Scores have standard deviation 6. The dense reference in the same dtype bounds the errors."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, num_global_tokens=3)
    inputs = make_inputs(2, 4, 3 + 150, 64, dtype, "right", garbage=1e3, num_kept=4)
    inputs = inputs._replace(query=inputs.query * 6)
    rows = inputs.attention_mask[:, None, :, None]
    expected = run_reference(inputs, pattern)
    plain = run_attention(inputs, pattern, implementation="reference")
    got = run_attention(inputs, pattern, implementation="torch")
    for name, x in expected.items():
        assert_close(name, got[name] * rows, x * rows, 1.5 * relative_rms(plain[name] * rows, x * rows))


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_scores_of_any_size(dtype, offset):
    """A row's powers of two overflow, or all are 0, unless its maximum is subtracted. Some rows see nothing."""
    pattern = LSGPattern(8, 8, 2, "pooling", num_global_tokens=3)
    inputs = make_inputs(2, 2, 3 + 77, 4, dtype, "right")
    inputs.attention_mask[1] = False
    inputs.query[..., 0], inputs.key[..., 0] = offset, 1.0  # scores are offset / 2 and more, or less
    expected, rows = run_reference(inputs, pattern), inputs.attention_mask[:, None, :, None]
    plain, got = (run_attention(inputs, pattern, implementation=name) for name in ("reference", "torch"))
    for name, x in expected.items():
        assert got[name].isfinite().all()
        error = relative_rms(plain[name] * rows, x * rows)
        assert_close(name, got[name] * rows, x * rows, max(2 * error, TOLERANCES[dtype]))


@each_implementation
def test_dropout_has_the_right_mean_and_spread(implementation):
    """With equal keys and values of 1, out is the mean of 24 Bernoulli draws over 1 - p."""
    pattern, p, draws = LSGPattern(8, 0, 2, num_global_tokens=0), 0.3, 400
    value = torch.ones(1, 1, 80, 4, dtype=F64)
    query = key = torch.zeros_like(value)
    torch.manual_seed(0)
    outs = torch.stack(
        [lsg_attention(query, key, value, pattern, dropout_p=p, implementation=implementation) for _ in range(draws)]
    )[:, 0, 0, 8:72, 0]  # inner blocks see 24 keys
    variance = p / (1 - p) / 24
    error = (variance / outs.numel()) ** 0.5
    assert abs(outs.mean().item() - 1) < 5 * error
    assert abs(outs.var().item() / variance - 1) < 0.05
    assert (outs[0] != outs[1]).any()  # another call, another mask


@each_implementation
def test_scale_multiplies_queries(implementation):
    """Also the query that bos_pooling weights by."""
    inputs = make_inputs(1, 2, 2 + 50, 4, F64)
    pattern = LSGPattern(8, 8, 4, "bos_pooling", num_global_tokens=2)
    scaled = inputs._replace(query=inputs.query * 3)
    expected = run_attention(scaled, pattern, implementation=implementation, scale=0.1)["out"]
    got = run_attention(inputs, pattern, implementation=implementation, scale=0.3)["out"]
    assert_close("out", got, expected)
    default = run_attention(inputs, pattern, implementation=implementation)["out"]
    assert_close("out", run_attention(inputs, pattern, implementation=implementation, scale=0.5)["out"], default)


@each_implementation
def test_the_mask_may_change_before_the_backward(implementation):
    inputs = make_inputs(1, 2, 1 + 40, 4, F64, "right")
    pattern = LSGPattern(8, 8, 2, "pooling")
    expected = run_attention(inputs, pattern, implementation=implementation)["dquery"]
    query, mask = inputs.query.requires_grad_(), inputs.attention_mask.clone()
    out = lsg_attention(query, *inputs[1:3], pattern, mask, implementation=implementation)
    mask.fill_(True)
    assert torch.equal(torch.autograd.grad(out, query, inputs.dout)[0], expected)


@each_implementation
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_strides_change_nothing(implementation, sparsity_type):
    """Memory as a projection writes it, (batch, length, heads, head_dim), and an expanded incoming gradient."""
    pattern = LSGPattern(8, 8, 2, sparsity_type)
    inputs = make_inputs(2, HEADS, 1 + 45, 4, F64, "right")
    strided = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]), inputs.attention_mask)
    ones = inputs._replace(dout=torch.ones((), dtype=F64).expand_as(inputs.dout))
    for a, b in ((strided, inputs), (ones, inputs._replace(dout=torch.ones_like(inputs.dout)))):
        assert_all_close(
            run_attention(a, pattern, implementation=implementation),
            run_attention(b, pattern, implementation=implementation),
            1e-12,
        )


@each_implementation
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("shape", [(0, 2, 40, 4), (2, 2, 0, 4), (1, 2, 3, 4)])
def test_empty_and_all_global_inputs_keep_their_shape(implementation, sparsity_type, shape):
    pattern = LSGPattern(8, 8, 2, sparsity_type, num_global_tokens=min(3, shape[2]))
    got = run_attention(make_inputs(*shape, F64), pattern, implementation=implementation)
    assert all(x.shape == shape for x in got.values())


def test_the_size_of_the_workspace_changes_nothing(monkeypatch):
    """It may hold one block, some blocks or several heads."""
    pattern = LSGPattern(8, 8, 2, num_global_tokens=3)
    inputs = make_inputs(2, 5, 3 + 77, 4, F64, "right")
    expected = run_reference(inputs, pattern)
    for budget in (1, 1000, 20_000, 1 << 20):
        monkeypatch.setattr("lsg_attn.blockwise.sweep._CPU_SCORES", budget)
        assert_all_close(run_attention(inputs, pattern, implementation="torch"), expected)


def test_dropout_does_not_depend_on_the_number_of_threads(monkeypatch):
    """Nor do its gradients; in tiles so small that the threads decide how many there are."""
    monkeypatch.setattr("lsg_attn.blockwise.sweep._CPU_SCORES", 1 << 14)
    threads, found = torch.get_num_threads(), []
    query, key, value, dout, _ = make_inputs(1, 6, 500, 16)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            out = lsg_attention(*leaves, LSGPattern(32, 32, 2), dropout_p=0.3)
            found.append((out, *torch.autograd.grad(out, leaves, dout)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
