"""Graphs that leave Python: torch.export for any length, AOTInductor, ONNX; and shapes without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention
from lsg_attn.call import Call
from lsg_attn.fused.results import allocate, allocate_saved, to_save


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("num_globals", [0, 2])
def test_exports_for_lengths_from_1_on(sparsity_type, num_globals):
    """Lengths on both sides of T = 2B, made from an example on one side."""
    pattern = LSGPattern(128, 128, 4, sparsity_type, num_globals)
    layer = LSGAttention(16, 4, pattern).eval()
    length = Dim("length", min=max(num_globals, 1), max=8192)
    program = export(layer, (torch.randn(2, 100, 16),), dynamic_shapes=({1: length},))
    for tokens in (1, 5, 256, 257, 5000):
        x = torch.randn(2, num_globals + tokens, 16)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_aot_inductor_runs_the_layer(tmp_path):
    layer = LSGAttention(16, 4, LSGPattern(16, 16, 4, num_global_tokens=1)).eval()
    length = Dim("length", min=2, max=1024)
    with torch.no_grad():
        program = export(layer, (torch.randn(2, 100, 16),), dynamic_shapes=({1: length},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for tokens in (20, 300):
            x = torch.randn(2, 1 + tokens, 16)
            torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_meta_and_fake_tensors_have_shapes(implementation):
    pattern = LSGPattern(16, 16, 2, num_global_tokens=1)
    real = torch.empty(2, 4, 100, 8, dtype=torch.bfloat16)
    expected = lsg_attention(real, real, real, pattern, implementation=implementation, return_lse=True)
    found = []
    with torch.device("meta"):
        x = torch.empty(2, 4, 100, 8, dtype=torch.bfloat16)
        found.append(lsg_attention(x, x, x, pattern, implementation=implementation, return_lse=True))
    with FakeTensorMode():
        x = torch.empty(2, 4, 100, 8, dtype=torch.bfloat16)
        options = {"dropout_p": 0.1, "implementation": implementation, "return_lse": True}
        found.append(lsg_attention(x, x, x, pattern, **options))
    for got in found:
        for x, y in zip(got, expected, strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_what_the_kernels_save_has_one_shape_for_all_lengths(sparsity_type, packed):
    """Nothing is asked of a length that is a symbol, and for numbers the shapes are what the kernels' results have."""
    pattern, environment = LSGPattern(16, 16, 2, sparsity_type, 1), ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    sequences = (torch.tensor([0, 40, 100]), 60) if packed else (None, 0)
    real = torch.empty(1, 4, 100, 8)
    with FakeTensorMode(shape_env=environment) as mode:
        x = mode.from_tensor(real, symbolic_context=dynamic)
        found = allocate_saved(Call(x, x, x, None, None, (), 0.0, 1.0, pattern, 0, *sequences))
    assert environment.guards == []
    call = Call(real, real, real, None, None, (), 0.0, 1.0, pattern, 0, *sequences)
    for got, saved in zip(found, to_save(call, allocate(call)), strict=True):
        assert [int(n) for n in got.shape] == list(saved.shape)


def to_onnx(module, example, path):
    """A session that runs the module for any length (dimension 1 of each input) of 3 and more."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    length = Dim("length", min=3, max=8192)
    program = torch.onnx.export(
        module, example, dynamo=True, dynamic_shapes=tuple({1: length} for _ in example), verbose=False
    )
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path))
    names = [x.name for x in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )


@pytest.mark.filterwarnings("ignore")  # those of the exporter
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_onnx_runs_the_layer_at_any_length(sparsity_type, tmp_path):
    layer = LSGAttention(16, 4, LSGPattern(16, 16, 2, sparsity_type, 1)).eval()
    run = to_onnx(layer, (torch.randn(2, 100, 16), torch.ones(2, 100, dtype=torch.int64)), tmp_path / "layer.onnx")
    for length in (20, 100, 257):
        x, mask = torch.randn(2, length, 16), torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        torch.testing.assert_close(run(x, mask)[mask != 0], layer(x, mask)[mask != 0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runs_an_encoder(tmp_path):
    pytest.importorskip("transformers")
    from lsg_attn.models import LSGBartConfig, LSGBartModel  # only where transformers is

    sizes = {"d_model": 16, "vocab_size": 50, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"decoder_ffn_dim": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    pattern = {"block_size": 16, "sparse_block_size": 16, "sparsity_factor": 2, "num_global_tokens": 2}
    encoder = LSGBartModel(LSGBartConfig(**sizes, **heads, **pattern, max_position_embeddings=512)).encoder.eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    module, mask = Encoder().eval(), torch.ones(2, 90, dtype=torch.int64)
    run = to_onnx(module, (torch.randint(50, (2, 90)), mask), tmp_path / "encoder.onnx")
    for length in (20, 90, 200):
        ids, mask = torch.randint(50, (2, length)), torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        torch.testing.assert_close(run(ids, mask), module(ids, mask), atol=1e-4, rtol=1e-4)
