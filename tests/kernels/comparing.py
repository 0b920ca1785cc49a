"""Compare what the kernels give with the reference in float64, and with what they gave before."""

import torch
from running import Attended, attend, dense_scores

from lsg_attn.compression import lsh_directions
from lsg_attn.testing import TOLERANCES, assert_close, run_reference

GRADIENTS = ("dquery", "dkey", "dvalue")


def check(inputs, pattern, scale=None):
    """Run the kernels and compare."""
    assert_equals_reference(attend(inputs, pattern, scale=scale), inputs, pattern, scale)


def assert_equals_reference(got, inputs, pattern, scale=None):
    """Compare out and lse where the query is a token, and the gradients everywhere.

    The gradients of the globals are sums over all positions. They are compared separately, so that their size does
    not hide errors in the gradients of the tokens.
    """
    group, inputs = group_of(inputs), with_repeated_keys(inputs)
    expected = run_reference(inputs, pattern, scale=scale)
    for name in ("dkey", "dvalue"):
        expected[name] = expected[name].unflatten(1, (-1, group)).sum(2)
    assert_forward_equals(got, expected["out"], inputs, pattern, scale)
    first = pattern.num_global_tokens
    if pattern.causal and first == 1:  # it sees itself alone, so that its query's gradient is a rounding error
        first = 0
    for name in GRADIENTS:
        for positions, part in (("tokens", slice(first, None)), ("globals", slice(0, first))):
            assert_close(f"{name} of {positions}", getattr(got, name)[:, :, part].cpu(), expected[name][:, :, part])


def group_of(inputs):
    """How many heads of queries read one of keys."""
    return inputs.query.shape[1] // inputs.key.shape[1]


def with_repeated_keys(inputs):
    """The inputs with a head of keys for each head of queries."""
    key, value = (x.repeat_interleave(group_of(inputs), 1) for x in (inputs.key, inputs.value))
    return inputs._replace(key=key, value=value)


def assert_forward_equals(got, expected_out, inputs, pattern, scale=None):
    """Compare out and lse where the query is a token. Out is finite everywhere."""
    out, lse = got.out.cpu(), got.lse.cpu()
    rows = inputs.attention_mask[:, None, :, None]
    assert out.isfinite().all()
    assert_close("out", out * rows, expected_out * rows)
    expected_lse = reference_lse(inputs, pattern, scale)
    sees_nothing = expected_lse == torch.inf
    assert torch.equal(lse == torch.inf, sees_nothing)
    assert lse[~sees_nothing].isfinite().all()
    seen = rows[..., 0] & ~sees_nothing
    assert_close("lse", lse.where(seen, 0.0), expected_lse.where(seen, 0.0), TOLERANCES[out.dtype])


def reference_lse(inputs, pattern, scale=None):
    """The log-sum-exp of each query's scores, +inf where it sees nothing."""
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    scores, _ = dense_scores(inputs, pattern, lsh_directions(pattern, heads, head_dim), scale)
    lse = scores.logsumexp(-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def assert_same_bits(got, expected):
    """Compare two :class:`Attended`."""
    for name, x, y in zip(Attended._fields, got, expected, strict=True):
        assert torch.equal(x, y), name
