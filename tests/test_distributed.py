"""A sequence shared out over processes: the results and the gradients of one process."""

import itertools
import os
import random
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from lsg_attn import (
    SPARSITY_TYPES,
    LSGAttention,
    LSGPattern,
    attention_weights,
    lsg_attention,
    lsg_attention_varlen,
    with_global_positions,
)
from lsg_attn.communication import Group
from lsg_attn.distributed import context_parallel, gather, shard
from lsg_attn.testing import PADDINGS, TOLERANCES, assert_close, make_inputs

PATTERN = LSGPattern(16, 16, 4, "norm", 2)


def cases(count):
    """Of each sparsity type ``count``: pattern, tokens, padding, dropout, key heads and dtype."""
    rng = random.Random(0)
    for sparsity_type, i in itertools.product(SPARSITY_TYPES, range(count)):
        sparse, factor = rng.choice([(8, 2), (8, 4), (4, 4), (16, 2)])
        pattern = LSGPattern(8, sparse, factor, sparsity_type, rng.choice([0, 1, 17]), causal=i % 4 == 3)
        tokens = rng.choice([1, 8, 16, 17, 24, 40, 67, 91])  # of dense attention, spans of a block, and empty ones
        dropout, dtype = rng.choice([0.0, 0.0, 0.5]), rng.choice([torch.float64, torch.float32])
        yield pattern, tokens, rng.choice(PADDINGS), dropout, rng.choice([2, 4]), dtype


def run(attend, inputs, dlse, seed=3):
    """out, lse, and the gradients of the whole query, key and value."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    torch.manual_seed(seed)
    out, lse = attend(*leaves, inputs.attention_mask)
    lse = lse.masked_fill(lse.isinf(), 0)
    torch.autograd.backward((out, lse), (inputs.dout, dlse))
    return {"out": out, "lse": lse, **{f"d{name}": x.grad for name, x in zip(("q", "k", "v"), leaves, strict=True)}}


def alone(pattern, options, query, key, value, mask):
    """What one process computes."""
    return lsg_attention(query, key, value, pattern, mask, return_lse=True, **options)


def together(mesh, pattern, options, query, key, value, mask):
    """What processes compute together, whole on each."""
    with context_parallel(mesh) as group:
        q, k, v = (shard(x, group, pattern=pattern, dim=2) for x in (query, key, value))
        mask = shard(mask, group, pattern=pattern, dim=1)
        found = lsg_attention(q, k, v, pattern, mask, return_lse=True, **options)
        return [gather(x, group, pattern=pattern, dim=2) for x in found]


def check_attention(mesh, count):
    for pattern, tokens, padding, dropout, key_heads, dtype in cases(count):
        inputs = make_inputs(2, 4, pattern.num_global_tokens + tokens, 6, dtype, padding)
        inputs = inputs._replace(key=inputs.key[:, :key_heads], value=inputs.value[:, :key_heads])
        dlse = inputs.dout[..., 0].contiguous()
        implementation = "torch" if dropout else ("auto", "reference")[tokens % 2]
        options = {"dropout_p": dropout, "implementation": implementation}
        if not pattern.rule.is_hashed:
            options["first_head"] = 3
        expected = run(partial(alone, pattern, options), inputs, dlse)
        seed = 3 + dist.get_rank()  # the first process's counts
        got, again = (run(partial(together, mesh, pattern, options), inputs, dlse, seed) for _ in range(2))
        for name, x in expected.items():
            assert_close(f"{pattern}, {tokens} tokens, {padding}, {dropout}: {name}", got[name], x, TOLERANCES[dtype])
            assert torch.equal(got[name], again[name]), name


def check_layer(mesh):
    """Parameters: the mean of all processes' gradients, as DDP gives them. The reference, too."""
    for implementation in ("auto", "reference"):
        layer = LSGAttention(24, 4, PATTERN, implementation=implementation).double()
        x = torch.randn(2, 90, 24, dtype=torch.float64)
        found = []
        for module in (layer, torch.nn.parallel.DistributedDataParallel(layer)):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            if module is layer:
                out = layer(leaf)
            else:
                with context_parallel(mesh) as group:
                    out = module(shard(leaf, group, pattern=PATTERN, dim=1))
                    out = gather(out, group, pattern=PATTERN, dim=1)
            out.square().sum().backward()
            found.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        for got, expected in zip(*found, strict=True):
            assert_close(implementation, got, expected, 1e-10)


def check_errors(mesh):
    rank = dist.get_rank()
    q = torch.randn(1, 2, 2 + 32, 8)
    with context_parallel(mesh):
        for pattern, x, message in (
            (LSGPattern(16, 16, 4, "norm", 2, lsh_seed=rank), q, "lsh_seed: expected the same on all ranks.*0, 1"),
            (PATTERN, q.double() if rank else q, "dtype: expected the same.*float32, torch.float64"),
            (PATTERN, q[:, :, : 2 + 8 * (1 + rank)], r"whole blocks of 16 tokens.*rank 0 has 8 tokens of 24"),
            (PATTERN, q.clone().requires_grad_(rank == 0), r"requires_grad: expected the same.*\[True, False\]"),
        ):
            with pytest.raises(ValueError, match=message):
                lsg_attention(x, x.detach(), x.detach(), pattern)
        with pytest.raises(ValueError, match=r"implementation: expected the same.*\['torch', 'reference'\]"):
            lsg_attention(q, q, q, PATTERN, implementation=("torch", "reference")[rank])
        with pytest.raises(ValueError, match="one sequence at a time"):
            lsg_attention_varlen(*[q[0].transpose(0, 1)] * 3, torch.tensor([0, 34]), 34, PATTERN)
        for refused in (
            lambda: with_global_positions(q, q, q, PATTERN, torch.zeros(1, 34, dtype=torch.bool)),
            lambda: attention_weights(q, q, PATTERN, rows=[0]),
        ):
            with pytest.raises(ValueError, match="expected whole sequences, but within context_parallel"):
                refused()
        with pytest.raises(ValueError, match="draws dropout for a whole"):
            lsg_attention(q, q, q, PATTERN, dropout_p=0.5, implementation="reference")
        leaf = q.detach().clone().requires_grad_()
        out = lsg_attention(leaf, leaf, leaf, PATTERN).sum()
    out.backward(retain_graph=True)
    first, leaf.grad = leaf.grad, None
    out.backward()
    assert torch.equal(leaf.grad, first)
    with pytest.raises(RuntimeError, match="retain_graph"):
        out.backward()
    with pytest.raises(TypeError, match="expected a DeviceMesh or a ProcessGroup, got int"), context_parallel(3):
        pass
    with pytest.raises(ValueError, match="dim: expected a dimension"):
        shard(q, mesh, pattern=PATTERN, dim=4)


def check_lost_process(mesh, folder):
    """One process is gone in the middle of a model's layers: the others say which, at once."""
    rank = dist.get_rank()
    q = torch.randn(1, 2, 2 + 32, 8)
    with context_parallel(mesh):
        lsg_attention(q, q, q, PATTERN)
        if rank == 1:
            os._exit(0)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"rank {rank} lost rank 1 of \[0, 1, 2\]"):
            [lsg_attention(q, q, q, PATTERN) for _ in range(2)]
        assert time.monotonic() - start < 30
    (folder / f"{rank}").touch()
    os._exit(0)  # what is left of the group cannot be ended together


def check_counts(mesh):
    """What a process gets does not grow with the sequence."""
    found = []
    for tokens in (128 * 4, 256 * 4):
        x = torch.randn(1, 2, 2 + tokens, 8)
        with context_parallel(mesh) as group:
            own = shard(x, group, pattern=PATTERN, dim=2)
            lsg_attention(own, own, own, PATTERN)
            found.append((group.received_bytes, group.messages))
    assert found[0] == found[1]
    assert found[0][1] > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_processes_compute_what_one_does(ranks, tmp_path):
    run_processes(ranks, [check_attention], tmp_path, 6)


def test_two_processes(tmp_path):
    run_processes(2, [check_layer, check_errors], tmp_path)


def test_four_processes(tmp_path):
    run_processes(4, [check_counts], tmp_path)


def test_a_lost_process_is_named(tmp_path):
    run_processes(3, [check_lost_process], tmp_path, tmp_path)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "2").exists()


def test_a_group_needs_one_dimension():
    with pytest.raises(TypeError, match="expected a DeviceMesh or a ProcessGroup, got NoneType"):
        Group(None)
