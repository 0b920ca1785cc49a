"""The C++ implementation: against the reference, what it cannot run, and how it is built."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from strategies import AWKWARD_SHAPES, cases

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.blockwise import compiled, eager, library
from lsg_attn.call import Call
from lsg_attn.testing import TOLERANCES, Inputs, make_inputs, relative_rms, run_attention, run_reference

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_library = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))


@pytest.fixture(autouse=True)
def _several_threads():
    """Two, also where the suite runs with one; a test may set another number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def check(inputs, pattern, **options):
    """Compare out and gradients with the reference in float64; of padded queries, nothing has a meaning.

    Where a query sees one key only, its gradient is 0 but for rounding errors, which are small beside value's.
    """
    expected = run_reference(inputs, pattern, **options)
    got = run_attention(inputs, pattern, implementation="cpp", **options)
    rows = inputs.attention_mask[:, None, :, None]
    size = (expected["dvalue"] * rows).square().mean().sqrt().item()
    for name, x in expected.items():
        assert got[name].dtype == inputs.query.dtype
        error = (got[name].double() - x)[rows.expand_as(x)].square().mean().sqrt().item() if rows.any() else 0.0
        least = size if name.startswith("d") else 1e-3
        bound = TOLERANCES[inputs.query.dtype] * max(relative_size(x * rows), least)
        assert error <= bound, f"{name}: error {error:.1e} is above {bound:.1e}"
    return got


def relative_size(x):
    return x.square().mean().sqrt().item() if x.numel() else 0.0


@needs_library
@settings(max_examples=150)
@given(cases(causal=None))
def test_small_patterns(case):
    pattern, length, padding = case
    first = pattern.num_global_tokens
    check(make_inputs(2, 3, length, 4, padding=padding, garbage=1e3, num_kept=first + 1), pattern)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize(("tokens", "head_dim", "num_globals", "padding"), AWKWARD_SHAPES)
def test_each_type_dtype_and_shape(sparsity_type, dtype, tokens, head_dim, num_globals, padding):
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals)
    inputs = make_inputs(2, 4, tokens + num_globals, head_dim, dtype, padding, garbage=1e3, num_kept=num_globals + 1)
    check(inputs, pattern)


@needs_library
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_windows_that_are_taken_in_pieces(dtype, causal):
    """More than 128 queries in a block, and more than 1,024 keys, an odd number, in a window; and the globals' rows."""
    pattern = LSGPattern(300, 300, 2, "pooling", 3, causal=causal)
    check(make_inputs(1, 2, 3 + 1700, 18, dtype, "ends", garbage=1e3, num_kept=4), pattern)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize(("block", "chunk", "factor"), [(128, 128, 2), (200, 100, 4), (6, 6, 2), (60, 60, 30)])
def test_the_hash_is_that_of_pytorch(block, chunk, factor, rounds, dtype):
    """Rounds of 1 to 64 directions; chunks of which the last is cut."""
    pattern = LSGPattern(block, chunk, factor, "lsh", 1, lsh_num_pre_rounds=rounds)
    x = make_inputs(2, 3, 5 * block // 2 + 2, 20, dtype, "middle", garbage=1e3, num_kept=2)
    mask = x.attention_mask
    call = Call(x.query, x.key, x.value, mask, None, (), 0.0, 1.0, pattern)
    got, expected = (steps.compress(call) for steps in (compiled, eager))
    kept = mask[:, None, 1:].bool().expand_as(expected.slot)
    assert torch.equal(got.slot[kept], expected.slot[kept])
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.keep, expected.keep)


@needs_library
@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_scores_of_any_size(offset):
    """Scores are ``offset`` / 2 and more, or less. Some rows see nothing: their out and gradients are 0."""
    pattern = LSGPattern(8, 8, 2, "pooling", num_global_tokens=3)
    inputs = make_inputs(2, 2, 3 + 77, 4, padding="right")
    inputs.attention_mask[1] = False
    inputs.query[..., 0], inputs.key[..., 0] = offset, 1.0
    expected, rows = run_reference(inputs, pattern), inputs.attention_mask[:, None, :, None]
    plain, got = (run_attention(inputs, pattern, implementation=name) for name in ("reference", "cpp"))
    for name, x in expected.items():
        assert (got[name][1] == 0).all()
        error = relative_rms(plain[name] * rows, x * rows)
        assert relative_rms(got[name] * rows, x * rows) <= max(2 * error, TOLERANCES[torch.float32])


@needs_library
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.4e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_large_scores_are_as_exact_as_the_results_dtype(dtype, bound):
    """With scores of standard deviation 8, 16-bit results lose little more than their own rounding."""
    inputs = make_inputs(1, 4, 1 + 1024, 64, dtype)
    inputs, pattern = inputs._replace(query=inputs.query * 8), LSGPattern(sparsity_type="pooling")
    expected = run_reference(inputs, pattern)
    for name, x in run_attention(inputs, pattern, implementation="cpp").items():
        assert relative_rms(x, expected[name]) <= bound


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_in_memory_does_not_matter(dtype):
    """Windows of 25 and 17 keys leave room in a vector, and in a pair of bfloat16."""
    pattern = LSGPattern(8, 0, 2, "none", 1)
    inputs = make_inputs(1, 1, 1 + 80, 16, dtype)
    torch.set_num_threads(1)
    for _ in range(3):
        freed = [torch.full((size,), torch.nan) for size in range(16, 8192, 16) for _ in range(2)]
        del freed
        assert all(x.isfinite().all() for x in run_attention(inputs, pattern, implementation="cpp").values())
        check(inputs, pattern)


@needs_library
def test_nan_stays_nan():
    inputs = make_inputs(1, 1, 1 + 60, 8)
    inputs.key[0, 0, 30, 2] = torch.nan
    out = lsg_attention(*inputs[:3], LSGPattern(8, 8, 2, "none"), implementation="cpp")
    seen = torch.zeros(61, dtype=torch.bool)
    seen[[0, *range(17, 41)]] = True  # the global row, and those of blocks 2 to 4: token 29 is in block 3
    assert torch.equal(out.isnan().all(-1)[0, 0], seen)
    assert torch.equal(out.isnan().any(-1)[0, 0], seen)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype):
    """Heads side by side, as a projection writes them; rows an odd number of elements apart; transposed; expanded."""
    pattern = LSGPattern(16, 16, 2, "norm")
    inputs = make_inputs(2, 3, 1 + 90, 8, dtype, "right")
    expected = run_attention(inputs, pattern, implementation="cpp")

    def restrided(change):
        return Inputs(*(change(x) for x in inputs[:4]), inputs.attention_mask)

    def padded(x):
        return torch.nn.functional.pad(x, (2, 1))[..., 2:-1]

    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        padded,
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
    ):
        other = restrided(change)
        assert not other.query.is_contiguous()
        got = run_attention(other, pattern, implementation="cpp")
        assert all(torch.equal(got[name], x) for name, x in expected.items())
    mask = inputs.attention_mask.t().contiguous().t()  # an entry's tokens are apart
    got = run_attention(inputs._replace(attention_mask=mask), pattern, implementation="cpp")
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    ones = [inputs._replace(dout=x) for x in (torch.ones((), dtype=dtype).expand_as(inputs.dout), inputs.dout * 0 + 1)]
    a, b = (run_attention(x, pattern, implementation="cpp") for x in ones)
    assert all(torch.equal(a[name], x) for name, x in b.items())
    key = inputs.key[:, :, :1].expand_as(inputs.key)  # one row, 0 elements apart
    a, b = (lsg_attention(inputs.query, x, inputs.value, pattern, implementation="cpp") for x in (key, key.clone()))
    assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("shape", [(0, 2, 40, 4), (2, 2, 0, 4), (1, 2, 3, 4)])
def test_empty_and_all_global_inputs_keep_their_shape(shape):
    pattern = LSGPattern(8, 8, 2, "pooling", num_global_tokens=min(3, shape[2]))
    got = run_attention(make_inputs(*shape), pattern, implementation="cpp")
    assert all(x.shape == shape for x in got.values())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_from_any_threads(dtype):
    """More threads than heads cut a head's blocks into groups, of which gradients of keys and values are sums."""
    pattern = LSGPattern(8, 8, 2, "pooling")
    inputs = make_inputs(1, 2, 1 + 300, 8, dtype)
    results = {}
    for count in (1, 2, 5, 5):
        torch.set_num_threads(count)
        got = check(inputs, pattern)
        for name, x in got.items():
            assert torch.equal(x, results.setdefault((name, count), x))
            if name in ("out", "dquery"):
                assert torch.equal(x, results[name, 1])


@needs_library
def test_calls_from_several_threads_at_once():
    pattern = LSGPattern(16, 16, 2, "norm")
    inputs = [make_inputs(1, 2, 1 + 200, 8, seed=seed) for seed in range(4)]
    expected = [run_attention(x, pattern, implementation="cpp") for x in inputs]
    got = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            got[i] = run_attention(inputs[i], pattern, implementation="cpp")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("out", "dquery", "dkey", "dvalue"))


@needs_library
def test_products_in_float32_where_the_processor_has_none_of_bfloat16(monkeypatch):
    monkeypatch.setattr("lsg_attn.blockwise.sweep._SUPPORTS_PRODUCTS_OF", {torch.bfloat16: lambda: False})
    monkeypatch.setattr("lsg_attn.blockwise.library.has_bfloat16_products", lambda: False)
    pattern = LSGPattern(16, 16, 2, "norm")
    got = check(make_inputs(1, 2, 1 + 100, 16, torch.bfloat16), pattern)
    expected = run_attention(make_inputs(1, 2, 1 + 100, 16, torch.bfloat16), pattern, implementation="torch")
    assert relative_rms(got["out"], expected["out"]) < 1e-3  # each rounds only the result


@needs_library
def test_auto_is_cpp_where_it_can_run():
    inputs, pattern = make_inputs(1, 2, 1 + 100, 16), LSGPattern(16, 16, 2)
    auto, cpp, eager = (lsg_attention(*inputs[:3], pattern, implementation=x) for x in ("auto", "cpp", "torch"))
    assert torch.equal(auto, cpp)
    assert not torch.equal(auto, eager)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        (torch.float64, 8, {}, "the dtype is torch.float64, the C++ takes float32, bfloat16 and float16"),
        (torch.bfloat16, 7, {}, "head_dim is 7, in bfloat16 the C++ takes even ones"),
        (torch.float32, 8, {"dropout_p": 0.5}, "dropout_p is 0.5, the C++ has no dropout"),
    ],
)
def test_what_it_cannot_run(dtype, head_dim, options, reason):
    """It says so, and "auto" is "torch"."""
    inputs, pattern = make_inputs(1, 2, 1 + 40, head_dim, dtype), LSGPattern(8, 8, 2)
    with pytest.raises(ValueError, match=r"^implementation='cpp' cannot run: .*; use 'auto' or 'torch'$") as error:
        lsg_attention(*inputs[:3], pattern, implementation="cpp", **options)
    assert reason in str(error.value)
    outs = []
    for implementation in ("auto", "torch"):
        torch.manual_seed(0)
        outs.append(lsg_attention(*inputs[:3], pattern, implementation=implementation, **options))
    assert torch.equal(*outs)


def test_the_environment_does_without(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "0")
    inputs, pattern = make_inputs(1, 2, 1 + 40, 8), LSGPattern(8, 8, 2)
    auto, eager = (lsg_attention(*inputs[:3], pattern, implementation=x) for x in ("auto", "torch"))
    assert torch.equal(auto, eager)
    with pytest.raises(ValueError, match="the environment variable LSG_ATTN_CPP is 0"):
        lsg_attention(*inputs[:3], pattern, implementation="cpp")


CODE = """
import logging, sys, torch
from lsg_attn import LSGPattern, lsg_attention
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
x = torch.randn(1, 2, 41, 8)
for _ in range(2):
    auto, eager = (lsg_attention(x, x, x, LSGPattern(8, 8, 2), implementation=name) for name in ("auto", "torch"))
print("equal" if torch.equal(auto, eager) else "close" if torch.allclose(auto, eager, atol=1e-5) else "other")
"""


def start(folder, **variables):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **variables}
    return subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)


@needs_library
def test_it_is_built_once_also_by_processes_that_start_together(tmp_path):
    for count in (2, 1):
        started = [start(tmp_path) for _ in range(count)]
        for lines in (process.communicate()[0].splitlines() for process in started):
            assert ("compiling C++" in lines[0]) == (count == 2)
            assert lines[-2].startswith("attention on the CPU: compiled C++, ")
            assert lines[-1] == "close"
    (library_file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert library_file.name == "lsg_attn_cpp.so"


@needs_library
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nowhere/g++"}, "as there is no C++ compiler (install g++, or name another in CXX)"),
        ({"CXX": "true"}, "as the C++ cannot be built or loaded: [Errno 2] No such file"),
        ({"CXX": "false"}, "as the C++ does not compile"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "as the processor has no AVX-512 (PyTorch says AVX2)"),
    ],
)
def test_what_it_lacks_is_said_once(tmp_path, variables, reason):
    *lines, result = start(tmp_path, **variables).communicate()[0].splitlines()
    said = [line for line in lines if line.startswith("attention on the CPU: ")]
    assert len(said) == 1
    assert "eager PyTorch" in said[0]
    assert reason in said[0]
    assert result == "equal"


def test_a_failure_to_compile_names_the_first_error(tmp_path, monkeypatch, caplog):
    source = tmp_path / "operators.cpp"
    source.write_text("int f() { return missing; }\nint g() { return also_missing; }\n", encoding="utf-8")
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_unsuitable_reason", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    if library._compiler() is None:
        pytest.skip("there is no C++ compiler")
    with caplog.at_level(logging.WARNING, "lsg_attn"):
        reason = library._load.__wrapped__()
    assert "the C++ does not compile" in reason
    assert "missing" in reason
    assert "also_missing" not in reason
    assert reason in caplog.text
