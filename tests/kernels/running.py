"""Run the kernels of a forward on poisoned results."""

import torch

from lsg_attn import plan
from lsg_attn.call import Call, allocate
from lsg_attn.compression import Tokens, compress, lsh_directions
from lsg_attn.kernels.schedules import target_of
from lsg_attn.reference import visible_slots, visible_tokens
from lsg_attn.testing import Inputs

DEVICE = torch.device("cuda")


def poisoned(call):
    """Results that hold what no kernel writes: one that leaves an element out shows."""
    results = allocate(call)
    for x in results:
        x.fill_(float("nan") if x.is_floating_point() else -(1 << 30))
    return results


def forward(inputs, pattern, attention_mask="inputs", dropout_p=0.0, seed=0, scale=None, directions=None):
    """The Results of the kernels; ``attention_mask``: that of the inputs by default, or another, or None."""
    query, key, value, _, mask = (x.to(DEVICE) for x in inputs)
    mask = mask if isinstance(attention_mask, str) else attention_mask
    heads, head_dim = query.shape[1], query.shape[3]
    directions = lsh_directions(pattern, heads, head_dim) if directions is None else directions
    scale = head_dim**-0.5 if scale is None else scale
    call = Call(query, key, value, mask, pattern, dropout_p, seed, scale, tuple(x.to(DEVICE) for x in directions))
    results = poisoned(call)
    for launch in plan.plan_forward(call, results, target_of(query.device)):
        launch.run()
    return results


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
