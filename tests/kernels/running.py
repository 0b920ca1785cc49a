"""Run the kernels on poisoned results: the one test file that knows how the library plans and launches them."""

from typing import NamedTuple

import torch

from lsg_attn import LSGPattern, operator
from lsg_attn.call import Call
from lsg_attn.compression import Tokens, compress, lsh_directions
from lsg_attn.fused import backward, launch
from lsg_attn.fused import forward as forward_plan
from lsg_attn.fused.backward import allocate_gradients, plan_backward
from lsg_attn.fused.forward import plan_forward
from lsg_attn.fused.launch import run_on
from lsg_attn.fused.results import allocate, restore, to_save
from lsg_attn.fused.schedules import Schedule, Tuning, target_of
from lsg_attn.reference import visible_slots, visible_tokens
from lsg_attn.testing import Inputs, make_inputs

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Patterns unlike the default, for :func:`unusual_inputs`.
UNUSUAL_PATTERNS = [
    LSGPattern(18, 36, 3, "stride", 5),  # nothing is a power of two; s is more than B
    LSGPattern(20, 7, 5, "pooling", 3),  # s is less than the 4 slots of a block's right and left
    LSGPattern(20, 30, 20, "block_stride", 4),  # one slot a block
    LSGPattern(24, 24, 24, "norm", 2),  # one slot a chunk
    LSGPattern(48, 16, 4, "lsh", 1, lsh_num_pre_rounds=0),  # chunks of a third of a block
    LSGPattern(36, 36, 12, "lsh", 1, lsh_num_pre_rounds=2),  # three clusters of two directions
    LSGPattern(16, 32, 16, "lsh", 1),  # a single cluster
    LSGPattern(32, 16, 16, "lsh", 0),  # f = s: bos_pooling
    LSGPattern(16, 32, 1, "norm", 0),  # f = 1: the tokens themselves
    LSGPattern(16, 200, 4, "pooling", 1),  # the reach is more than the sequence
    LSGPattern(16, 0, 4, "norm", 200),  # no sparse part; globals in several tiles
]


def name_of(pattern):
    """The name of a pattern as a test's parameter."""
    return f"{pattern.sparsity_type}-B{pattern.block_size}-s{pattern.sparse_block_size}"


def padded_inputs(pattern, tokens, head_dim, dtype, padding, heads=2):
    """Inputs whose padding is garbage. Globals and the first token, whose query weights ``bos_pooling``, are kept."""
    first = pattern.num_global_tokens
    return make_inputs(1, heads, first + tokens, head_dim, dtype, padding, garbage=1e3, num_kept=first + 1)


def grouped(inputs, group):
    """The inputs with fewer heads of keys: one for each ``group`` of heads of queries."""
    return inputs._replace(key=inputs.key[:, ::group], value=inputs.value[:, ::group])


def unusual_inputs(pattern):
    """Inputs for one of ``UNUSUAL_PATTERNS``."""
    padding = "left" if pattern.num_global_tokens % 2 else "random"
    return padded_inputs(pattern, 4 * pattern.block_size + 5, 32, torch.float32, padding, heads=3)


def poison(tensors):
    """Fill them with values that no kernel writes, so that an element that is left out shows."""
    for x in tensors:
        x.fill_(float("nan") if x.is_floating_point() else -(1 << 30))
    return tensors


class Attended(NamedTuple):
    """Out, log-sum-exp and gradients of the kernels, on the GPU."""

    out: torch.Tensor
    lse: torch.Tensor
    dquery: torch.Tensor
    dkey: torch.Tensor
    dvalue: torch.Tensor


def attend(inputs, pattern, dlse=None, **options):
    """Run the kernels of a forward, and of the backward for the inputs' dout and for dlse.

    options: those of :func:`call_of`.
    """
    call = call_of(inputs, pattern, **options)
    saved = to_save(call, run_forward(call))
    return Attended(saved.out, saved.lse, *run_backward(call, saved, inputs.dout, dlse))


def forward(inputs, pattern, **options):
    """Run the kernels of a forward alone and return their Results; options: those of :func:`call_of`."""
    return run_forward(call_of(inputs, pattern, **options))


def run_forward(call):
    """The Results of a call, by the kernels."""
    results = poison(allocate(call))
    run_on(DEVICE, plan_forward(call, results, target_of(DEVICE)))
    return results


def run_backward(call, saved, dout, dlse=None):
    """The Gradients of a call, by the kernels, from what is Saved of its forward."""
    results, gradients = restore(call, saved), poison(allocate_gradients(call))
    dlse = None if dlse is None else dlse.to(DEVICE)
    run_on(DEVICE, plan_backward(call, results, dout.to(DEVICE), gradients, target_of(DEVICE), dlse=dlse))
    return gradients


def call_of(
    inputs, pattern, attention_mask="inputs", dropout_p=0.0, seed=0, scale=None, directions=None, first_head=0,
    cu_seqlens=None, max_seqlen=0, section=None,
):  # fmt: skip
    """The call on a GPU; ``attention_mask``: the inputs' own by default, or another, or None."""
    query, key, value, _, mask = (x.to(DEVICE) for x in inputs)
    mask = mask if isinstance(attention_mask, str) else attention_mask
    heads, head_dim = query.shape[1], query.shape[3]
    directions = lsh_directions(pattern, heads, head_dim) if directions is None else directions
    scale = head_dim**-0.5 if scale is None else scale
    directions = tuple(x.to(DEVICE) for x in directions)
    seed = torch.tensor(seed) if dropout_p else None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
    options = (dropout_p, scale, pattern, first_head, cu_seqlens, max_seqlen, section)
    return Call(query, key, value, mask, seed, directions, *options)


def use_parts_of(positions, monkeypatch):
    """Split the work on the globals into parts of so many positions."""
    monkeypatch.setattr(launch, "_PART", positions)


def use_tiles_of(block_m, block_n, monkeypatch):
    """Run forward and backward kernels with tiles of these sizes."""
    schedule = Schedule(block_m, block_n, Tuning(4, 1))
    monkeypatch.setattr(forward_plan, "forward_schedule", lambda *_: schedule)
    monkeypatch.setattr(backward, "backward_schedule", lambda *_: schedule)


def record_launches(monkeypatch):
    """A list that the names of launched kernels go to. The kernels do not run."""
    names = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: names.append(self.kernel.__name__))
    return names


def operator_calls(inputs, pattern, attention_mask, seed, dropout_p):
    """Two functions that run the operator's forward and, given the forward's results, its backward."""
    query, key, value, dout, _ = inputs
    arguments = operator._arguments(Call(query, key, value, attention_mask, seed, (), dropout_p, 0.25, pattern))
    return (
        lambda: operator._attention(*arguments),
        lambda results: operator._attention_backward(dout, None, results, *arguments),
    )


def to_double(inputs):
    """The inputs in float64, on the CPU."""
    return Inputs(*(x.cpu().double() for x in inputs[:4]), inputs.attention_mask.cpu())


def exact_compression(inputs, pattern, directions, scale):
    """The compression by PyTorch in float64."""
    query, key, _, _, mask = to_double(inputs)
    first = pattern.num_global_tokens
    rounds = [x.double() for x in directions]
    return compress(pattern, Tokens(query[:, :, first:], key[:, :, first:], mask[:, first:], scale, rounds))


def dense_scores(inputs, pattern, directions, scale):
    """Scores (batch, heads, length, columns) in float64, -inf if a key is not visible, and the columns' values.

    The columns are the positions of the sequence, then the slots.
    """
    query, key, value, _, mask = to_double(inputs)
    first, length = pattern.num_global_tokens, query.shape[2]
    visible = visible_tokens(pattern, length) & mask[:, None, None, :]
    if (compression := exact_compression(inputs, pattern, directions, scale)) is not None:
        slots = visible_slots(pattern, length) & compression.keep.unsqueeze(-2)
        visible = torch.cat([visible.expand(*slots.shape[:-1], -1), slots], -1)
        key, value = (torch.cat([x, compression.apply(x[:, :, first:])], -2) for x in (key, value))
    return (query @ key.mT * scale).masked_fill(~visible, -torch.inf), value
