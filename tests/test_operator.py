"""The Triton implementation without a GPU: what stands in its way, and its operator, which runs on a CPU too."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention
from lsg_attn.blockwise.attention import blockwise_attention
from lsg_attn.call import Call, Section
from lsg_attn.compression import compress_call
from lsg_attn.dispatch import _choose
from lsg_attn.fused.limits import unsupported_reasons
from lsg_attn.fused.results import allocate, to_save
from lsg_attn.fused.schedules import missing_rows
from lsg_attn.fused.variant import variant_of
from lsg_attn.operator import _arguments, _call
from lsg_attn.packing import attend_each
from lsg_attn.reference import visible_slots, visible_tokens
from lsg_attn.testing import Inputs, assert_close, make_inputs, run_reference

operator = torch.ops.lsg_attn.attention


class OnAGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda, is_cpu = True, False


def call_of(query, key, value, pattern, attention_mask=None, dropout_p=0.0, scale=1.0, seed=11):
    return Call(
        query, key, value, attention_mask, torch.tensor(seed) if dropout_p else None, (), dropout_p, scale, pattern
    )


def arguments(pattern, dropout_p=0.0, scale=0.3):
    inputs = make_inputs(2, 4, pattern.num_global_tokens + 90, 8, padding="random")
    return _arguments(call_of(*inputs[:3], pattern, inputs.attention_mask, dropout_p, scale))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype is torch.float64, the kernels take float16, bfloat16 and float32"),
        ({"head_dim": 257}, "head_dim is 257, the kernels take up to 256"),
        ({"pattern": LSGPattern(num_global_tokens=513)}, "num_global_tokens is 513, the kernels take up to 512"),
        ({"pattern": LSGPattern(256, 256, 2, "lsh")}, "= 256 tokens, the kernels up to 128"),
        (
            {"pattern": LSGPattern(2), "dropout_p": 0.1},
            "block_size is 2, the kernels share a sequence out with dropout",
        ),
        ({"scale": 0.0}, "scale is 0.0, the kernels take one above 0"),
        ({"capability": (7, 5)}, "compute capability is 7.5, the kernels need 8.0"),
        ({"has_triton": False}, "triton is not installed"),
        ({"triton": (3, 5)}, "triton is 3.5, the kernels need 3.6 or newer"),
    ],
)
def test_each_reason_is_named_alone(change, reason, monkeypatch):
    case = {"dtype": torch.float16, "head_dim": 64, "pattern": LSGPattern(), "scale": 1.0}
    case |= {"capability": (8, 0), "has_triton": True, "triton": (3, 6), "dropout_p": 0.0}
    case |= change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr("lsg_attn.fused.limits._HAS_TRITON", case["has_triton"])
    monkeypatch.setattr("lsg_attn.fused.limits._TRITON", case["triton"])
    x = torch.zeros(1, 1, 600, case["head_dim"], dtype=case["dtype"])
    x = x.as_subclass(OnAGPU)
    call = call_of(x, x, x, case["pattern"], dropout_p=case["dropout_p"], scale=case["scale"])
    (got,) = unsupported_reasons(replace(call, section=Section(0, 900, 0, 500, True)))
    assert reason in got


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_hashed", "reason"),
    [
        (torch.float16, 64, True, ""),
        (torch.float32, 64, False, ""),
        (torch.bfloat16, 65, False, "head_dim is 65, the kernels take up to 64 on gfx1100"),
        (torch.float32, 64, True, "the dtype is torch.float32, the kernels hash only 16-bit types on gfx1100"),
    ],
)
def test_what_rdna_has_too_few_registers_for(dtype, head_dim, is_hashed, reason):
    assert missing_rows("gfx1100", dtype, head_dim, is_hashed) == ([reason] if reason else [])
    assert missing_rows("gfx942", dtype, head_dim, is_hashed) == []


def test_offsets_have_64_bits_where_a_head_spans_that_much():
    """A head's own offsets in the inputs, in out, which has all heads of a token side by side, and in the mask."""
    x, mask = torch.empty(1, 16, 1 << 20, 64, device="meta"), torch.empty(1, 1 << 20, device="meta")
    far = torch.empty(1, 1 << 20, 64, 33, device="meta").permute(0, 3, 1, 2)
    far_mask = torch.empty(1, 1 << 20, 1 << 12, device="meta")[..., 0]
    pattern = LSGPattern(num_global_tokens=0)
    for is_wide, call in (
        (False, call_of(x, x, x, pattern, mask)),
        (True, call_of(*[torch.empty(1, 32, 1 << 20, 64, device="meta")] * 3, pattern)),
        (True, call_of(x, x, far[:, :16], pattern)),
        (True, call_of(x, x, x, pattern, far_mask)),
    ):
        assert variant_of(call).is_wide == is_wide
    assert variant_of(call_of(x, x, x, pattern), far).is_wide


def test_what_dispatch_chooses_on_a_gpu(monkeypatch):
    """The kernels where nothing stands in their way, with and without a gradient."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for requires_grad in (False, True):
        x = torch.zeros(1, 1, 10, 64, dtype=torch.bfloat16, requires_grad=requires_grad).as_subclass(OnAGPU)
        call = call_of(x, x, x, LSGPattern())
        assert unsupported_reasons(call) == []
        assert _choose("auto", call) == "operator"
        assert _choose("triton", call) == "operator"
        assert _choose("auto", call_of(x, x, x, LSGPattern(), scale=-1.0)) == "torch"


def test_forward_mode_gradients_are_not_supported():
    x = torch.zeros(1, 1, 10, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert any(
            "a gradient by forward mode" in reason for reason in unsupported_reasons(call_of(x, dual, x, LSGPattern()))
        )
        assert not any("gradient" in reason for reason in unsupported_reasons(call_of(x, x, x, LSGPattern())))


def test_operator_takes_a_call_apart_and_puts_it_together():
    x = torch.zeros(1, 1, 10, 4)
    call = call_of(x, x, x, LSGPattern(24, 12, 3, "lsh", 5, 2, 7), torch.ones(1, 10), dropout_p=0.5, scale=0.3)
    for section in (None, Section(48, 100, 24, 48, False)):
        assert _call(*_arguments(replace(call, section=section))) == replace(call, section=section)


def test_error_of_triton_on_a_cpu_has_the_reason_and_alternatives():
    x = torch.zeros(1, 1, 10, 64)
    with pytest.raises(ValueError, match=r"the tensors are on device cpu.* use 'auto' or 'torch'"):
        lsg_attention(x, x, x, LSGPattern(), implementation="triton")


# torch 2.14 reads the .grad of non-leaf tensors in its own check
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_operator_passes_opcheck(sparsity_type, dropout_p):
    """Checks of schema, fake tensors, autograd, tracing with dynamic shapes, also of the backward."""
    check_operator(arguments(LSGPattern(16, 16, 4, sparsity_type, 3), dropout_p))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_operator_passes_opcheck_with_packed_sequences_and_fewer_key_heads(dropout_p):
    case = _arguments(packed_call(dropout_p))
    check_operator(case)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operator_passes_opcheck_with_a_section():
    call = replace(packed_call(), cu_seqlens=None, max_seqlen=0)
    check_operator(_arguments(replace(call, section=Section(32, 300, 0, 147, False))))  # all rows are queries


def packed_call(dropout_p=0.0):
    query, key, value, _, _ = make_inputs(1, 4, 150, 8)
    call = call_of(query, key[:, :2], value[:, :2], LSGPattern(16, 16, 4, "stride", 3), dropout_p=dropout_p)
    return replace(call, cu_seqlens=torch.tensor([0, 80, 80, 110, 150]), max_seqlen=80, first_head=1)


def test_operator_is_block_wise_attention_of_packed_sequences():
    call = packed_call()
    leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    out, lse = operator(*_arguments(call))
    expected = attend_each(partial(blockwise_attention, implementation=_choose("auto", call)), call)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    grads = (torch.autograd.grad(x.square().sum() + y.sum(), leaves) for x, y in ((out, lse), expected))
    for got, wanted in zip(*grads, strict=True):
        assert torch.equal(got, wanted)


def check_operator(case):
    torch.library.opcheck(operator, case)
    results = operator(*case)
    for dlse in (None, torch.randn_like(results[1])):
        grads = (torch.randn_like(results[0]), dlse)
        torch.library.opcheck(torch.ops.lsg_attn.attention_backward, (*grads, results, *case))
    leaves = [x.requires_grad_() for x in case[:3]]
    torch.library.opcheck(operator, (*leaves, *case[3:]))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_operator_is_block_wise_attention_on_a_cpu(sparsity_type):
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    query, key, value, mask, *rest = arguments(pattern)
    out, _ = operator(query, key, value, mask, *rest)
    assert torch.equal(out, lsg_attention(query, key, value, pattern, mask, scale=0.3))


def log_sum_exp(call):
    """The log-sum-exp (batch, heads, G+T) of each query's scores, all of which are computed."""
    first, length = call.pattern.num_global_tokens, call.query.shape[2]
    key, visible = call.key, visible_tokens(call.pattern, length) & call.keep()[:, None, None]
    if (compression := compress_call(call)) is not None:
        key = torch.cat([key, compression.apply(key[:, :, first:])], 2)
        slots = visible_slots(call.pattern, length) & compression.keep[:, :, None]
        visible = torch.cat([visible.expand(*slots.shape[:3], -1), slots], 3)
    return (call.query @ key.mT * call.scale).masked_fill(~visible, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_operator_has_the_gradients_and_the_log_sum_exp_of_the_reference(sparsity_type):
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    query, key, value, dout, mask = make_inputs(2, 4, 3 + 90, 8, padding="random", num_kept=4)
    mask[1] = False
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = operator(*_arguments(call_of(*leaves, pattern, mask, scale=8**-0.5)))
    assert_close("lse", lse[0], log_sum_exp(call_of(query, key, value, pattern, mask, scale=8**-0.5))[0])
    assert (lse[1] == torch.inf).all()
    expected = run_reference(Inputs(query, key, value, dout, mask), pattern)
    for name, got in zip(("dquery", "dkey", "dvalue"), torch.autograd.grad(out, leaves, dout), strict=True):
        assert_close(name, got, expected[name])


def test_operator_draws_from_its_seed():
    case = arguments(LSGPattern(16, num_global_tokens=3), dropout_p=0.5)
    first, again = (operator(*case)[0] for _ in range(2))
    other = operator(*case[:4], torch.tensor(12), *case[5:])[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def assert_drops_the_same(attend):
    """Out is linear in value where forward and backward have the same masks: the gradient of |out|^2 / 2 says so."""
    query, key, value, *_ = arguments(LSGPattern(16, num_global_tokens=3))
    value.requires_grad_()
    out = attend(query, key, value)
    out.double().square().sum().div(2).backward()
    assert (value.grad * value).sum().item() == pytest.approx(out.double().square().sum().item(), rel=1e-4)


def test_operator_drops_the_same_with_other_threads():
    """The number of threads may change between the forward and the backward."""
    threads = torch.get_num_threads()

    def attend(*qkv):
        pattern = LSGPattern(16, num_global_tokens=3)
        out, _ = operator(*_arguments(call_of(*qkv, pattern, dropout_p=0.5, scale=0.3, seed=7)))
        torch.set_num_threads(threads + 1)
        return out

    try:
        assert_drops_the_same(attend)
    finally:
        torch.set_num_threads(threads)


def test_compiled_and_checkpointed_dropout():
    """Each by itself, and one in the other."""

    def drop(query, key, value):
        return lsg_attention(query, key, value, LSGPattern(16, num_global_tokens=3), dropout_p=0.5)

    assert_drops_the_same(torch.compile(drop, fullgraph=True))
    assert_drops_the_same(lambda *x: checkpoint(drop, *x, use_reentrant=False))
    assert_drops_the_same(torch.compile(lambda *x: checkpoint(drop, *x, use_reentrant=False), fullgraph=True))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_lsg_attention_compiles_as_one_graph(sparsity_type):
    """Any length above 2B runs without compiling again."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    compiled = torch.compile(lambda *x: lsg_attention(*x[:3], pattern, x[3]), fullgraph=True)
    for tokens in (90, 101, 333):
        *qkv, _, mask = make_inputs(2, 4, 3 + tokens, 8, padding="random")
        for x, dimension in (*((x, 2) for x in qkv), (mask, 1)):
            torch._dynamo.mark_dynamic(x, dimension)
        with torch.compiler.set_stance("default" if tokens == 90 else "fail_on_recompile"):
            out = compiled(*qkv, mask)
        assert_close("out", out, lsg_attention(*qkv, pattern, mask), 1e-6)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_a_training_step_compiles_as_one_graph(sparsity_type):
    """Forward and backward of a layer, in float64: the gradient of k_proj.bias is 0 except for rounding errors."""
    torch.manual_seed(0)
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    layer = LSGAttention(16, 4, pattern).double()
    hidden, dout = torch.randn(2, 2, 3 + 90, 16, dtype=torch.float64)
    expected = torch.autograd.grad(layer(hidden), layer.parameters(), dout)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(hidden), layer.parameters(), dout)
    for (name, _), x, y in zip(layer.named_parameters(), got, expected, strict=True):
        assert_close(name, x, y)


def test_autocast_does_not_change_the_dtype():
    pattern = LSGPattern(16, num_global_tokens=3)
    query, key, value, mask, *rest = arguments(pattern)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = operator(query, key, value, mask, *rest)
    assert torch.equal(out, operator(query, key, value, mask, *rest)[0])


def test_exports_as_one_operator():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return lsg_attention(query, key, value, LSGPattern(16))

    inputs = tuple(make_inputs(1, 2, 1 + 90, 8)[:3])
    program = torch.export.export(Attention(), inputs)
    assert "lsg_attn.attention" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Attention()(*inputs))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_results_are_as_small_as_they_can_be(sparsity_type):
    """Bytes besides out: no scores, no gathered keys; T/f rows of keys and values for the types that make new ones.

    And what a backward keeps of them: the log-sum-exp, and what was chosen.
    """
    heads, tokens, head_dim, factor = 4, 4096, 64, 4
    x = torch.empty(2, heads, 1 + tokens, head_dim, dtype=torch.bfloat16, device="meta")
    call = call_of(x, x, x, LSGPattern(128, 128, factor, sparsity_type))
    results = allocate(call)
    slots, rows = 2 * heads * tokens // factor, 2 * heads * tokens
    lse = 4 * 2 * heads * (1 + tokens)
    expected = {"none": 0, "stride": 0, "block_stride": 0, "norm": 4 * slots}
    pooled = slots * (4 + 2 * 2 * head_dim) + 4 * rows
    expected |= {"pooling": pooled, "bos_pooling": pooled, "lsh": pooled + 4 * rows}
    assert sum(y.nbytes for y in results[1:]) == lse + expected[sparsity_type]
    choice = {"norm": 4 * slots, "lsh": 4 * rows}
    assert sum(y.nbytes for y in to_save(call, results)[1:]) == lse + choice.get(sparsity_type, 0)
