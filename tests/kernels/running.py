"""Run the kernels of a forward and a backward on poisoned results."""

from dataclasses import replace

import torch

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.call import Call, allocate, restore, to_save
from lsg_attn.compression import Tokens, compress, lsh_directions
from lsg_attn.fused.backward import allocate_gradients, plan_backward
from lsg_attn.fused.forward import plan_forward
from lsg_attn.fused.launch import run_on
from lsg_attn.fused.schedules import target_of
from lsg_attn.reference import visible_slots, visible_tokens
from lsg_attn.testing import Inputs, make_inputs

DEVICE = torch.device("cuda")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What is unlike the default, for :func:`unusual_inputs`.
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
    """A pattern's name among the parameters of a test."""
    return f"{pattern.sparsity_type}-B{pattern.block_size}-s{pattern.sparse_block_size}"


def each_type_and_dtype(shapes):
    """(type, dtype, *shape) for each type and shape, the dtypes in turn: of six shapes, each dtype gets two."""
    return [
        (sparsity_type, DTYPES[(i + j) % 3], *shape)
        for i, sparsity_type in enumerate(SPARSITY_TYPES)
        for j, shape in enumerate(shapes)
    ]


def padded_inputs(pattern, tokens, head_dim, dtype, padding, heads=2):
    """Inputs whose padding is garbage, but never a global or the first token, whose query ``bos_pooling`` pools by."""
    first = pattern.num_global_tokens
    return make_inputs(1, heads, first + tokens, head_dim, dtype, padding, garbage=1e3, num_kept=first + 1)


def default_inputs(pattern):
    """For a pattern of default sizes, whose tiles lie in one block each and need no windows of their own."""
    return padded_inputs(pattern, 5 * 128 - 60, 64, torch.bfloat16, "right")


def unusual_inputs(pattern):
    """The inputs that go with one of ``UNUSUAL_PATTERNS``."""
    padding = "left" if pattern.num_global_tokens % 2 else "random"
    return padded_inputs(pattern, 4 * pattern.block_size + 5, 32, torch.float32, padding, heads=3)


def poison(tensors):
    """Fill them with what no kernel writes: one that leaves an element out shows."""
    for x in tensors:
        x.fill_(float("nan") if x.is_floating_point() else -(1 << 30))
    return tensors


def forward(inputs, pattern, **options):
    """The Results of the kernels; options: those of :func:`call_of`."""
    return run_forward(call_of(inputs, pattern, **options))


def backward(inputs, pattern, dout=None, **options):
    """The Gradients of the kernels, for the inputs' dout or another; options: those of :func:`call_of`."""
    call = call_of(inputs, pattern, **options)
    saved = to_save(call, run_forward(call))
    call = replace(call, directions=())
    results, gradients = restore(call, saved), poison(allocate_gradients(call))
    dout = inputs.dout.to(DEVICE) if dout is None else dout
    run_on(DEVICE, plan_backward(call, results, dout, gradients, target_of(DEVICE)))
    return gradients


def run_forward(call):
    """The Results of a call, by the kernels."""
    results = poison(allocate(call))
    run_on(DEVICE, plan_forward(call, results, target_of(DEVICE)))
    return results


def call_of(inputs, pattern, attention_mask="inputs", dropout_p=0.0, seed=0, scale=None, directions=None):
    """The call on a GPU; ``attention_mask``: that of the inputs by default, or another, or None."""
    query, key, value, _, mask = (x.to(DEVICE) for x in inputs)
    mask = mask if isinstance(attention_mask, str) else attention_mask
    heads, head_dim = query.shape[1], query.shape[3]
    directions = lsh_directions(pattern, heads, head_dim) if directions is None else directions
    scale = head_dim**-0.5 if scale is None else scale
    return Call(query, key, value, mask, pattern, dropout_p, seed, scale, tuple(x.to(DEVICE) for x in directions))


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
    """In float64, (batch, heads, length, columns) scores, -inf where a key is not visible, and the columns' values.

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
