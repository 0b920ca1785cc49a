"""Models whose documents are shared out over processes: the results and the gradients of one process."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from family_recordings import SEQ2SEQ, document, tiny
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from lsg_attn import LSGPattern
from lsg_attn.distributed import context_parallel, gather, shard
from lsg_attn.models import parallelize, use_lsg
from lsg_attn.models.families import FAMILIES
from lsg_attn.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import run_processes

BY_TITLE = {family.title: family for family in FAMILIES}
BERT, BART = BY_TITLE["BERT"], BY_TITLE["BART"]


def inputs_of(family, **options):
    ids, mask = document(**options)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": ids[:, :7]} if family in SEQ2SEQ else {})


def step(model, inputs):
    """All tensors that a model returns, and the gradients of a loss of them."""
    model.zero_grad()
    out = model(**inputs)
    found = {name: x for name, x in out.items() if isinstance(x, torch.Tensor)}
    sum(x.square().mean() for x in found.values()).backward()
    names = {name.replace("module.", "").replace("_checkpoint_wrapped_", ""): p for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in names.items() if p.grad is not None}
    return found, {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in grads.items()}


def compare(name, got, expected):
    for kind, x, y in zip(("out", "grad"), got, expected, strict=True):
        assert x.keys() == y.keys(), name
        for key in y:
            assert_close(f"{name}, {kind}, {key}", x[key], y[key], 1e-8)


def check_families(mesh):
    """Every encoder, with positions of every kind; padding; a training step."""
    for family in FAMILIES:
        model = tiny(family, pool_with_global=family is not BERT).double().train()
        inputs = inputs_of(family)
        expected = step(model, inputs)
        parallel = DistributedDataParallel(parallelize(model, mesh), find_unused_parameters=True)
        compare(family.title, step(parallel, inputs), expected)


def check_types(mesh):
    for sparsity_type in ("bos_pooling", "stride", "lsh"):
        for family in (BERT, BART):
            model = tiny(family, sparsity_type=sparsity_type, num_global_tokens=17, mask_first_token=True).double()
            inputs = inputs_of(family, length=120)
            expected = step(model.train(), inputs)
            parallel = DistributedDataParallel(parallelize(model, mesh), find_unused_parameters=True)
            compare(sparsity_type, step(parallel, inputs), expected)


def check_shards(mesh):
    """Outputs that stay shared out; gradient checkpointing; heads."""
    for options in ({}, {"pool_with_global": False}):
        model = tiny(BERT, **options).double().train()
        inputs = inputs_of(BERT)
        out = model(**inputs, output_hidden_states=True)
        pattern = model.config.lsg_pattern()
        own = [shard(x, mesh, pattern=pattern, dim=1, has_globals=False) for x in (out[0], inputs["attention_mask"])]
        states = [shard(x, mesh, pattern=pattern, dim=1) for x in out.hidden_states]
        parallelize(model, mesh, gather_outputs=False).gradient_checkpointing_enable({"use_reentrant": False})
        got = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(got.last_hidden_state, own[0])
        torch.testing.assert_close(got.pooler_output, out.pooler_output)
        torch.testing.assert_close(list(got.hidden_states), states)
        # A loss of each process's own tokens is its part of the whole loss.
        model.zero_grad()
        (got[0] * own[1].unsqueeze(-1)).square().sum().mul(dist.get_world_size()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for x in grads.values():
            dist.all_reduce(x)
            x /= dist.get_world_size()
        plain = tiny(BERT, **options).double().train()
        (plain(**inputs)[0] * inputs["attention_mask"].unsqueeze(-1)).square().sum().backward()
        for name, p in plain.named_parameters():
            if p.grad is not None:
                assert_close(name, grads[name], p.grad, 1e-8)


def check_dropout(mesh):
    """Each process has its own draws, and yet all go on with the same globals."""
    model = parallelize(tiny(BERT, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.2).train(), mesh)
    torch.manual_seed(dist.get_rank())
    seen = []
    for layer in model.ordered_layers():
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :3].detach()))
    model(**inputs_of(BERT))[0].sum().backward()
    for x in seen:
        everybody = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, x.contiguous())
        assert torch.equal(everybody[0], everybody[1])


def check_refusals(mesh):
    with pytest.raises(TypeError, match="expected an LSG model, got a Linear"):
        parallelize(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="as the decoder reads whole documents"):
        parallelize(tiny(BART), mesh, gather_outputs=False)
    head = next(cls for cls in BERT.models if cls.__name__.endswith("QuestionAnswering"))
    with pytest.raises(ValueError, match="as the model's head reads whole documents"):
        parallelize(tiny(BERT, head), mesh, gather_outputs=False)
    model = parallelize(tiny(BERT), mesh)
    ids = torch.ones(1, 40, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None, as parallelize shares out"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 40]), max_length_q=40)
    model = parallelize(tiny(BART, encoder_layerdrop=0.5).train(), mesh)
    with pytest.raises(ValueError, match="encoder_layerdrop: expected 0"):
        model(ids)


def check_any_encoder(mesh):
    """A plain model with LSG attention: the caller shares out ids and positions, of which the first are global."""
    if Version(transformers.__version__) < Version("5.0.1"):
        return  # no such interface for encoders
    pattern = LSGPattern(16, 16, 2, "norm", 2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    plain = use_lsg(BertModel(BertConfig(**sizes, vocab_size=99, pad_token_id=1)), pattern).double().eval()
    ids, mask = document()  # with padding that one process has
    expected = plain(ids, mask).last_hidden_state
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with context_parallel(mesh) as group:
        own = [shard(x, group, pattern=pattern, dim=1) for x in (ids, mask, positions)]
        states = plain(own[0], own[1], position_ids=own[2]).last_hidden_state
        torch.testing.assert_close(gather(states, group, pattern=pattern, dim=1), expected)


def check_fully_shard(mesh):
    """FSDP over the same processes averages gradients by itself."""
    from torch.distributed.fsdp import fully_shard

    plain = tiny(BERT).double().train()
    inputs = inputs_of(BERT)
    expected = step(plain, inputs)
    model = copy.deepcopy(parallelize(copy.deepcopy(plain), mesh))
    for layer in model.ordered_layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compare("fully_shard", step(model, inputs), expected)


def check_two_dimensions(_):
    """Heads shared out over one dimension of a mesh, tokens over the other; FSDP with tokens, documents with FSDP."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "other"))
    plain = tiny(BERT, sparsity_type="lsh").double().train()
    inputs = inputs_of(BERT)
    expected = step(plain, inputs)
    model = parallelize(copy.deepcopy(plain), mesh["context"])
    for layer in model.ordered_layers():
        attention = {f"attention.self.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan = attention | {"attention.output.dense": RowwiseParallel()}
        parallelize_module(layer, mesh["other"], plan)
    out, grads = step(model, inputs)
    for x in grads.values():
        dist.all_reduce(x, group=mesh["context"].get_group())
        x /= 2
    compare("heads and tokens", (out, grads), expected)
    # Each half of the processes reads a document of its own; FSDP averages over all four.
    model = parallelize(copy.deepcopy(plain), mesh["context"])
    everybody = init_device_mesh("cpu", (4,))
    for layer in model.ordered_layers():
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)
    row = mesh["other"].get_local_rank()
    _, grads = step(model, {name: x[row : row + 1] for name, x in inputs.items()})
    apart = [step(plain, {name: x[i : i + 1] for name, x in inputs.items()})[1] for i in range(2)]
    compare("documents and tokens", ({}, grads), ({}, {name: (apart[0][name] + apart[1][name]) / 2 for name in grads}))


def check_short(mesh):
    """More processes than blocks."""
    model = tiny(BERT).double().train()
    inputs = inputs_of(BERT, length=33, padding=3)
    expected = step(model, inputs)
    parallel = DistributedDataParallel(parallelize(model, mesh), find_unused_parameters=True)
    compare("short", step(parallel, inputs), expected)


def test_two_processes(tmp_path):
    checks = [check_families, check_shards, check_any_encoder, check_dropout, check_refusals, check_fully_shard]
    run_processes(2, checks, tmp_path)


def test_four_processes(tmp_path):
    run_processes(4, [check_types, check_two_dimensions, check_short], tmp_path)
