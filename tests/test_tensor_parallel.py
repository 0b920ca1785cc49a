"""Heads shared out over two processes by torch's tensor parallelism: the results of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention

IN, OUT = ("q_proj", "k_proj", "v_proj"), "out_proj"


def attention_plan(prefix=""):
    return {f"{prefix}{name}": ColwiseParallel() for name in IN} | {f"{prefix}{OUT}": RowwiseParallel()}


def compare(plain, parallel, x, name):
    """Outputs, and the gradients of inputs and of every parameter, whole again from their shards."""
    found = []
    for module in (plain, parallel):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        out.square().sum().backward()
        grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
        found.append(
            (out, leaf.grad, {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()})
        )
    torch.testing.assert_close(*(y[:2] for y in reversed(found)), msg=lambda m: f"{name}: {m}")
    for key, grad in found[0][2].items():
        torch.testing.assert_close(found[1][2][key], grad, msg=lambda m, key=key: f"{name}, {key}: {m}")


def check_layers(mesh):
    x = torch.randn(2, 90, 24, dtype=torch.float64)
    for sparsity_type in SPARSITY_TYPES:
        plain = LSGAttention(24, 4, LSGPattern(16, 16, 4, sparsity_type, 2)).double()
        parallel = parallelize_module(copy.deepcopy(plain), mesh, attention_plan())
        compare(plain, parallel, x, sparsity_type)
        packed = {"cu_seqlens": torch.tensor([0, 60, 90]), "max_seqlen": 60}
        torch.testing.assert_close(parallel(x[0], **packed), plain(x[0], **packed))


def check_errors(mesh):
    x = torch.randn(1, 40, 24)
    for plan, message in (
        (attention_plan(), "divides the 3 heads"),
        ({"q_proj": ColwiseParallel()}, "parallelize all three alike"),
    ):
        heads = 3 if "out_proj" in plan else 4
        layer = parallelize_module(LSGAttention(24, heads, LSGPattern(16, 16, 2)), mesh, plan)
        with pytest.raises(ValueError, match=message):
            layer(x)
    x = distribute_tensor(torch.randn(1, 2, 40, 8), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"query: expected a tensor of this process, got a DTensor"):
        lsg_attention(x, x, x, LSGPattern(16, 16, 2))


def check_dropout(mesh):
    """Two processes with one seed drop different keys: heads that are alike come out differently."""
    layer = LSGAttention(8, 2, LSGPattern(8, 8, 2), dropout=0.5, bias=False)
    with torch.no_grad():
        for name in IN:
            weight = getattr(layer, name).weight
            weight[4:] = weight[:4]
    parallel = parallelize_module(layer, mesh, attention_plan())
    torch.manual_seed(3)
    mine = parallel.attend(torch.ones(1, 40, 8) * torch.arange(40)[:, None] / 40)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine.detach())
    assert not torch.equal(*both)


def check_encoder(mesh):

    from lsg_attn.models import LSGBartConfig, LSGBartModel

    sizes = {"d_model": 24, "vocab_size": 40, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
    pattern = {"block_size": 16, "sparse_block_size": 16, "sparsity_factor": 4, "num_global_tokens": 2}
    for sparsity_type in ("stride", "lsh"):
        config = LSGBartConfig(
            **sizes, **heads, **pattern, sparsity_type=sparsity_type, max_position_embeddings=256, attention_dropout=0.0
        )
        encoder = LSGBartModel(config).double().encoder
        parallel = copy.deepcopy(encoder)
        for layer in parallel.layers:
            plan = attention_plan("self_attn.") | {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
            parallelize_module(layer, mesh, plan)
        embeds = torch.randn(2, 90, 24, dtype=torch.float64)
        wrapped = [_OfEmbeddings(x) for x in (encoder, parallel)]
        compare(*wrapped, embeds, sparsity_type)


class _OfEmbeddings(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, embeds):
        return self.encoder(inputs_embeds=embeds)


def test_two_processes(tmp_path):
    run_processes(2, [check_layers, check_errors, check_dropout], tmp_path)


def test_an_encoder_in_two_processes(tmp_path):
    pytest.importorskip("transformers")
    run_processes(2, [check_encoder], tmp_path)
