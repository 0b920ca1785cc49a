"""Bad input raises a ValueError or TypeError that says what was expected and what was given."""

import re
import warnings

import pytest
import torch

from lsg_attn import LSGAttention, LSGPattern, lsg_attention
from lsg_attn.blockwise import library
from lsg_attn.call import Call
from lsg_attn.operator import operator_attention

PATTERN = LSGPattern(8, 8, 2, num_global_tokens=2)
needs_library = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))


def qkv(*shape, dtype=torch.float32):
    return [torch.randn(shape or (2, 4, 2 + 40, 8)).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected an int >= 1, got 0"),
        ({"block_size": -8}, ValueError, "block_size: expected an int >= 1, got -8"),
        ({"block_size": 8.0}, TypeError, "block_size: expected an int, got 8.0 (float)"),
        ({"block_size": True}, TypeError, "block_size: expected an int, got True (bool)"),
        ({"block_size": "8"}, TypeError, "block_size: expected an int, got '8' (str)"),
        ({"sparse_block_size": -1}, ValueError, "sparse_block_size: expected an int >= 0, got -1"),
        ({"sparse_block_size": 1.5}, TypeError, "sparse_block_size: expected an int, got 1.5 (float)"),
        ({"sparsity_factor": -2}, ValueError, "sparsity_factor: expected an int >= 0, got -2"),
        ({"sparsity_factor": 0.5}, TypeError, "sparsity_factor: expected an int, got 0.5 (float)"),
        ({"num_global_tokens": -1}, ValueError, "num_global_tokens: expected an int >= 0, got -1"),
        ({"lsh_num_pre_rounds": -1}, ValueError, "lsh_num_pre_rounds: expected an int >= 0, got -1"),
        ({"lsh_seed": 1 << 63}, ValueError, "lsh_seed: expected an int below 2**63"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
        ({"lsh_seed": None}, TypeError, "lsh_seed: expected an int, got None (NoneType)"),
        ({"sparsity_type": "mean"}, ValueError, "got 'mean'"),
        ({"sparsity_type": None}, TypeError, "sparsity_type: expected a str, got NoneType"),
        ({"sparsity_factor": 3}, ValueError, "must divide block_size, got sparsity_factor=3 and block_size=128"),
        ({"sparse_block_size": 96}, ValueError, "got chunks of 96, sparsity_factor=2, block_size=128"),
        ({"sparse_block_size": 2, "sparsity_factor": 4}, ValueError, "got chunks of 2, sparsity_factor=4"),
        ({"sparse_block_size": 96, "sparsity_type": "lsh"}, ValueError, "got chunks of 96"),
    ],
)
def test_bad_pattern(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LSGPattern(**arguments)


def test_pattern_takes_integers_of_other_libraries():
    assert LSGPattern(block_size=torch.tensor(64)).block_size == 64


def test_pattern_is_frozen():
    with pytest.raises(AttributeError):
        PATTERN.block_size = 4


@pytest.mark.parametrize(
    ("sizes", "type_"), [((128, 96, 2), "pooling"), ((12, 5, 3), "stride"), ((8, 3, 2), "none"), ((8, 20, 8), "lsh")]
)
def test_unusual_patterns_are_valid(sizes, type_):
    assert LSGPattern(*sizes, type_).block_size == sizes[0]


def bad_calls():
    q, k, v = qkv()
    return {
        "not a tensor": ((q.tolist(), k, v), TypeError, "query: expected a torch.Tensor, got list"),
        "integers": ((q, k.long(), v), TypeError, "got torch.int64"),
        "three dimensions": ((q[0], k[0], v[0]), ValueError, "got shape (4, 42, 8)"),
        "other shape": ((q, k[:, :, 1:], v), ValueError, "key: expected query's shape"),
        "other heads": ((q, k, v[:, :2]), ValueError, "value: expected key's shape"),
        "heads that do not divide": ((q, k[:, :3], v[:, :3]), ValueError, "or a number of heads that divides 4"),
        "sparse": ((q, k.to_sparse(), v), ValueError, "key: expected a dense tensor, got torch.sparse_coo"),
        "other dtype": (
            (q, k, v.double()),
            ValueError,
            "value: expected query's dtype torch.float32, got torch.float64",
        ),
        "other device": ((q, k.to("meta"), v), ValueError, "key: expected query's device cpu, got meta"),
        "no heads": ((q[:, :0], k[:, :0], v[:, :0]), ValueError, "at least one head"),
        "no head_dim": ((q[..., :0], k[..., :0], v[..., :0]), ValueError, "head_dim of at least 1"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_tensors(name):
    tensors, error, message = bad_calls()[name]
    with pytest.raises(error, match=re.escape(message)):
        lsg_attention(*tensors, PATTERN)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": {"block_size": 8}}, TypeError, "pattern: expected an LSGPattern, got dict"),
        (
            {"pattern": LSGPattern(num_global_tokens=43)},
            ValueError,
            "expected at most the sequence's length 42, got 43",
        ),
        ({"attention_mask": [[1] * 40] * 2}, TypeError, "attention_mask: expected a torch.Tensor, got list"),
        ({"attention_mask": torch.ones(2, 40)}, TypeError, "got torch.float32"),
        (
            {"attention_mask": torch.ones(2, 41, dtype=torch.bool)},
            ValueError,
            "expected shape (batch, T) = (2, 40) or (batch, G+T) = (2, 42), or a batch of 1; got (2, 41)",
        ),
        ({"attention_mask": torch.ones(40, dtype=torch.bool)}, ValueError, "got (40,)"),
        ({"attention_mask": torch.ones(3, 40, dtype=torch.bool)}, ValueError, "or a batch of 1; got (3, 40)"),
        ({"first_head": -1}, ValueError, "first_head: expected an int >= 0, got -1"),
        ({"return_lse": 1}, TypeError, "return_lse: expected a bool, got int"),
        (
            {"attention_mask": torch.ones(2, 40, dtype=torch.bool, device="meta")},
            ValueError,
            "attention_mask: expected query's device cpu, got meta",
        ),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability in [0, 1), got -0.1"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability in [0, 1), got 1.0"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": torch.ones(1)}, TypeError, "scale: expected a number, got Tensor"),
        (
            {"implementation": "cuda"},
            ValueError,
            "expected 'auto', 'triton', 'cpp', 'torch' or 'reference', got 'cuda'",
        ),
        ({"implementation": None}, TypeError, "implementation: expected a str, got NoneType"),
        (
            {"implementation": "triton"},
            ValueError,
            "the tensors are on device cpu, the kernels need a CUDA",
        ),
        ({"lsh_projections": [torch.ones(1)]}, ValueError, "this pattern compresses by 'norm'"),
        (
            {"pattern": LSGPattern(8, 8, 2, "lsh"), "lsh_projections": [torch.ones(4, 8, 4)]},
            ValueError,
            "expected shapes [(4, 8, 4), (4, 8, 2)], got [(4, 8, 4)]",
        ),
    ],
)
def test_bad_options(options, error, message):
    options = {"pattern": PATTERN, **options}
    with pytest.raises(error, match=re.escape(message)):
        lsg_attention(*qkv(), **options)


@pytest.mark.parametrize("projections", [3, [1, 2], [torch.ones(4, 8, 4, dtype=torch.complex64)] * 2])
def test_projections_of_a_wrong_type(projections):
    with pytest.raises(TypeError, match="lsh_projections: expected"):
        lsg_attention(*qkv(), LSGPattern(8, 8, 2, "lsh"), lsh_projections=projections)


def test_projections_on_another_device():
    projections = [torch.ones(4, 8, m, device="meta") for m in (4, 2)]
    with pytest.raises(ValueError, match="lsh_projections: expected query's device cpu, got meta"):
        lsg_attention(*qkv(), LSGPattern(8, 8, 2, "lsh"), lsh_projections=projections)


@pytest.mark.parametrize("sparsity_type", ["stride", "block_stride"])
def test_stride_types_warn_when_heads_do_not_cover_the_tokens(sparsity_type):
    with pytest.warns(UserWarning, match="at least sparsity_factor=8 heads; there are 4"):
        lsg_attention(*qkv(), LSGPattern(8, 8, 8, sparsity_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsg_attention(*qkv(), LSGPattern(8, 8, 4, sparsity_type))  # as many heads as tokens a group
        lsg_attention(*qkv(2, 4, 17, 8), LSGPattern(8, 8, 8, sparsity_type))  # short: nothing is compressed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8.0, 2), TypeError, "embed_dim: expected an int, got 8.0 (float)"),
        ((8, 0), ValueError, "num_heads: expected an int >= 1, got 0"),
        ((10, 4), ValueError, "embed_dim: expected a multiple of num_heads=4, got 10"),
        ((8, 2, {"block_size": 8}), TypeError, "pattern: expected an LSGPattern, got dict"),
        ((8, True), TypeError, "num_heads: expected an int, got True (bool)"),
    ],
)
def test_bad_layer(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LSGAttention(*arguments)


def test_bad_layer_options_and_input():
    with pytest.raises(ValueError, match=re.escape("dropout: expected a probability in [0, 1), got 2")):
        LSGAttention(8, 2, dropout=2)
    with pytest.raises(TypeError, match="dropout: expected a number, got bool"):
        LSGAttention(8, 2, dropout=False)
    with pytest.raises(TypeError, match="bias: expected a bool, got str"):
        LSGAttention(8, 2, bias="no")
    with pytest.raises(TypeError, match=re.escape("hidden_states: expected a torch.Tensor, got list")):
        LSGAttention(8, 2)([[0.0] * 8])
    with pytest.raises(ValueError, match=re.escape("parameters' dtype torch.float32, got torch.float64")):
        LSGAttention(8, 2)(torch.randn(2, 10, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected the parameters' device cpu, got meta"):
        LSGAttention(8, 2)(torch.randn(2, 10, 8, device="meta"))
    with pytest.raises(
        ValueError, match="implementation: expected 'auto', 'triton', 'cpp', 'torch' or 'reference', got 'fast'"
    ):
        LSGAttention(8, 2, implementation="fast")
    with pytest.raises(ValueError, match=re.escape("expected shape (batch, G+T, 8), got (2, 10, 12)")):
        LSGAttention(8, 2)(torch.randn(2, 10, 12))
    with pytest.raises(TypeError, match="unexpected keyword argument 'block_size'"):
        LSGAttention(8, 2, block_size=8)


def test_lsh_of_some_heads_needs_their_directions():
    with pytest.raises(ValueError, match="lsh_projections: expected tensors where first_head is given"):
        lsg_attention(*qkv(), LSGPattern(8, 8, 2, "lsh"), first_head=0)


def test_one_row_of_a_mask_is_for_all():
    mask, inputs = torch.rand(1, 40) < 0.7, qkv()
    assert torch.equal(lsg_attention(*inputs, PATTERN, mask), lsg_attention(*inputs, PATTERN, mask.expand(2, -1)))


@pytest.mark.parametrize("implementation", ["torch", pytest.param("cpp", marks=needs_library), "operator"])
def test_a_second_derivative_names_what_has_one(implementation):
    query, key, value = (x.requires_grad_() for x in qkv())
    if implementation == "operator":
        call = Call(query, key, value, None, None, (), 0.0, 1.0, PATTERN)
        out, _ = operator_attention(call)
    else:
        out = lsg_attention(query, key, value, PATTERN, implementation=implementation)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="use implementation='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_torch_func_names_what_it_can_differentiate(implementation):
    def loss(query, implementation):
        return lsg_attention(query, *qkv()[1:], PATTERN, implementation=implementation).sum()

    with pytest.raises(ValueError, match=r"transforms of torch\.func; use 'reference'"):
        torch.func.grad(loss)(qkv()[0], implementation)
    assert torch.func.grad(loss)(qkv()[0], "reference").shape == qkv()[0].shape
