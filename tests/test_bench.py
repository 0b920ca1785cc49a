"""The bench: its checks, statistics, arithmetic, files and plans. Speed itself is not tested."""

import ast
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, fresh, peers
from bench.cases import BACKWARD, FORWARD, TRAIN, Section, TimedCase
from bench.flops import BOUNDS, LARGE, PRODUCTS_ALONE, flops, matmul_bounds, num_scores
from bench.measure import asked, measure
from bench.record import Writer, read
from bench.subject import DisagreementError, check, make_step, make_subject
from bench.timing import Clock, interleave, ratio, spread
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.memory import peak_memory

ROOT = Path(fresh.__file__).parent.parent
TINY = LSGPattern(16, 16, 2)
ATTENTION = TimedCase("attention", "tiny", 256, pattern=TINY)
ENCODER = TimedCase("encoder", "tiny", 1024, pattern=TINY)


def peer_of(level, name):
    (peer,) = (peer for peer in peers.of_level(level) if peer.name == name)
    return peer


def test_adapters_of_one_name_look_alike_and_different_peers_do_not():
    looks = {(peer.name, peer.label, peer.color) for peer in (*peers.ATTENTION, *peers.ENCODERS)}
    for names in zip(*looks, strict=True):  # names, labels, colors
        assert len(set(names)) == len(looks) == len(peers.NAMES)


def test_preloaded_modules_exist():
    assert "transformers.models.led.modeling_led" in peers.PRELOAD
    assert all(find_spec(module) for module in peers.PRELOAD)


def test_groups_of_peers_are_those_that_sections_ask_for():
    groups = {group for peer in (*peers.ATTENTION, *peers.ENCODERS) for group in peer.groups}
    sections = [section for device in ("cpu", "cuda") for section in cases.plan(device, quick=False)]
    assert groups == {section.group for section in sections} - {""}
    (encoders,) = (x for x in cases.plan("cpu", quick=True) if x.group == cases.SEQ2SEQ)
    names = [peer.name for peer in asked(encoders, encoders.cases[0], peers.NAMES)]
    assert names == ["lsg triton", "lsg cpp", "lsg torch", "original", "dense", "led", "bigbird_pegasus"]


@pytest.mark.parametrize("name", ["lsg cpp", "lsg torch", "original"])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_lsg_peers_agree_with_the_reference(name, sparsity_type):
    case = replace(ATTENTION, pattern=LSGPattern(16, 16, 2, sparsity_type), step=BACKWARD)
    check(peer_of("attention", name), case)


@pytest.mark.parametrize("sparsity_type", ["norm", "pooling"])  # a choice and a mean
def test_flex_agrees_with_the_reference(sparsity_type):
    check(peer_of("attention", "flex"), replace(ATTENTION, pattern=LSGPattern(128, 64, 4, sparsity_type, 3)))


@pytest.mark.parametrize("name", ["dense", "longformer"])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_other_attentions_agree_with_their_expected_result(name, dtype_name):
    check(peer_of("attention", name), replace(ATTENTION, step=BACKWARD, dtype_name=dtype_name))


@pytest.mark.parametrize("peer", [peer for peer in peers.ENCODERS if peer.name != "lsg triton"], ids=lambda x: x.name)
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_encoders_attentions_agree_with_their_expected_result(peer, dtype_name):
    case = replace(ENCODER, dtype_name=dtype_name, step=BACKWARD)
    check(peer, case)
    assert make_subject(peer, case).forward().dtype == case.dtype


@pytest.mark.parametrize("name", ["bigbird", "bigbird_pegasus"])
def test_check_finds_a_bigbird_that_became_full_attention(name, monkeypatch):
    peer = peer_of("encoder", name)
    build = type(peer).build

    def full(self, case):
        model = build(self, case)
        model.set_attention_type("original_full")
        return model

    monkeypatch.setattr(type(peer), "build", full)
    with pytest.raises(DisagreementError, match="relative RMS error"):
        check(peer, ENCODER)


def test_check_finds_an_encoder_with_wrong_gradients(monkeypatch):
    peer = peer_of("encoder", "led")
    build = type(peer).build

    def wrong(self, case):
        model = build(self, case)
        key = self.parts(model).key
        key.register_forward_hook(
            lambda module, inputs, out: 2 * out - out.detach()
        )  # the same value with twice the gradient
        return model

    monkeypatch.setattr(type(peer), "build", wrong)
    check(peer, ENCODER)
    with pytest.raises(DisagreementError, match="dhidden: relative RMS error"):
        check(peer, replace(ENCODER, step=TRAIN))


def with_wrong_gradients(query, key, value):
    """Dense attention with twice the gradient of the keys."""
    key = 2 * key - key.detach()
    return torch.nn.functional.scaled_dot_product_attention(*(x[:, :, 1:] for x in (query, key, value)))


def with_another_scale(query, key, value):
    """Dense attention with a slightly different scale."""
    return torch.nn.functional.scaled_dot_product_attention(*(x[:, :, 1:] for x in (1.01 * query, key, value)))


@pytest.mark.parametrize(("wrong", "what"), [(with_wrong_gradients, "dkey"), (with_another_scale, "out")])
def test_peer_with_a_wrong_result_has_no_figures(wrong, what, monkeypatch):
    monkeypatch.setattr(type(peer_of("attention", "dense")), "prepare", lambda self, case: wrong)
    case = replace(ATTENTION, step=BACKWARD)
    result = measure(Section("s", (case,), seconds=0, least=1), case, ["dense", "lsg torch"], {})
    assert {figure["peer"] for figure in result.figures} == {"lsg torch", *BOUNDS}
    assert [record["peer"] for record in result.skipped] == ["dense"]
    assert f"does not agree with the reference: dense, norm, float32, {what}" in result.skipped[0]["reason"]
    assert len(result.failures) == 1


def test_peer_that_raises_is_skipped_and_ours_is_a_failure(monkeypatch):
    def broken(self, case):
        raise RuntimeError("no such kernel\nmore")

    for name in ("dense", "lsg torch"):
        monkeypatch.setattr(type(peer_of("attention", name)), "prepare", broken)
    result = measure(Section("s", (ATTENTION,), seconds=0, least=1), ATTENTION, ["dense", "lsg torch", "original"], {})
    assert {record["peer"]: record["reason"] for record in result.skipped} == {
        "dense": "RuntimeError: no such kernel",
        "lsg torch": "RuntimeError: no such kernel",
    }
    (failure,) = result.failures
    assert failure["what"] == "lsg torch: RuntimeError: no such kernel"
    assert "in broken" in failure["traceback"]
    assert [(figure["peer"], figure["ratio"]) for figure in result.figures] == [
        (name, None) for name in ("original", *BOUNDS)
    ]


def test_peer_that_fails_while_timed_leaves_the_others_figures(monkeypatch):
    calls = []

    def tired(query, key, value):
        calls.append(0)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("full")
        return torch.nn.functional.scaled_dot_product_attention(*(x[:, :, 1:] for x in (query, key, value)))

    monkeypatch.setattr(type(peer_of("attention", "dense")), "prepare", lambda self, case: tired)
    result = measure(Section("s", (ATTENTION,), seconds=0, least=3), ATTENTION, ["dense", "lsg torch"], {})
    assert [record["reason"] for record in result.skipped] == ["OutOfMemoryError: full"]
    assert [(x["peer"], x["repetitions"]) for x in result.figures] == [(name, 3) for name in ("lsg torch", *BOUNDS)]


@pytest.mark.parametrize("step", [FORWARD, BACKWARD, TRAIN])
def test_steps_make_gradients_and_updates_as_named(step):
    case = replace(ENCODER, step=step)
    subject = make_subject(peer_of("encoder", "lsg torch"), case)
    before = [leaf.detach().clone() for leaf in subject.leaves]
    run = make_step(subject, step)
    run()
    run()
    has_gradients = [leaf.grad is not None for leaf in subject.leaves]
    changed = [not torch.equal(leaf, old) for leaf, old in zip(subject.leaves, before, strict=True)]
    assert any(has_gradients) == (step != FORWARD)
    assert any(changed) == (step == TRAIN)


def test_only_a_train_step_has_dropout():
    for step, same in ((BACKWARD, True), (TRAIN, False)):
        subject = make_subject(peer_of("encoder", "dense"), replace(ENCODER, step=step))
        assert torch.equal(subject.forward(), subject.forward()) == same


def test_repetitions_are_interleaved_and_short_steps_warmed_up():
    calls = []

    class Told(Clock):
        def seconds(self, step):
            step()
            return {"a": 1.0, "b": 100.0}[calls[-1]]

    times = interleave({x: lambda x=x: calls.append(x) for x in "ab"}, Told("cpu"), seconds=0.0, least=3)
    assert calls == ["a", "a", "b", "b", *["a", "a", "b"] * 2]
    assert times == {"a": [1.0] * 3, "b": [100.0] * 3}


def test_spread_and_ratio_are_percentiles():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert ratio([1.0, 6.0, 3.0], [1.0, 2.0, 3.0]).median == 1.0


@pytest.mark.parametrize("level", ["attention", "encoder"])
@pytest.mark.parametrize("step", [FORWARD, BACKWARD])
@pytest.mark.parametrize("pattern", [TINY, LSGPattern(16, sparsity_type="none"), LSGPattern(512)])
def test_matmul_bounds_do_the_counted_operations(level, step, pattern):
    case = TimedCase(level, "tiny", 1024, step, batch=2, pattern=pattern)
    bounds = matmul_bounds(case)
    with FlopCounterMode(display=False) as counter:
        bounds[LARGE].step()
    assert counter.get_total_flops() * bounds[LARGE].scale == flops(case, num_scores(pattern, case.tokens))
    bound = bounds[PRODUCTS_ALONE]
    with FlopCounterMode(display=False) as counter:
        bound.step()
    assert bound.scale == 1
    dense = pattern.is_dense(case.tokens)
    window = 3 * pattern.block_size + 1 + (2 * pattern.sparse_block_size if pattern.has_sparse else 0)
    scores = case.length**2 if dense else case.tokens * window
    assert counter.get_total_flops() == flops(case, scores)
    # the outer blocks' windows reach past the ends, and the bound leaves out the global queries
    assert 0.95 < num_scores(pattern, case.tokens) / scores < 1.02


def test_peak_memory_counts_memory_that_is_freed_again():
    results = []
    peak = peak_memory(lambda: results.append(torch.ones(50_000_000).sum().item()))
    assert results == [50_000_000]
    assert peak is None or 190e6 < peak.growth < 260e6
    assert peak is None or peak.resident > peak.growth


def test_library_does_not_import_its_bench():
    paths = [path for folder in ("lsg_attn", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert ROOT / "lsg_attn/cli/main.py" in paths
    imported = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            for name in names:
                imported.setdefault(name.split(".")[0], set()).add(path)
    assert "torch" in imported
    assert "bench" not in imported


def threads_and_heap():
    return torch.get_num_threads(), torch.ones(2).sum().item()


def test_fresh_processes_have_as_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fresh.call(threads_and_heap) == (1, 2.0)
    finally:
        torch.set_num_threads(before)


def test_record_file_reads_back_and_is_never_overwritten(tmp_path):
    path = tmp_path / "deep/run.jsonl"
    writer = Writer(path, {"quick": True}, "cpu")
    figure = {
        "section": "s",
        "case": replace(ENCODER, pattern=LSGPattern(32, 8, 4, "lsh", 2)),
        "peer": "led",
        "ms": [1.5],
    }
    writer.write("figures", figure)
    writer.write("skipped", {**figure, "reason": "none"})
    writer.close()
    run = read(path)
    assert run.figures == [figure]
    assert run.skipped == [{**figure, "reason": "none"}]
    assert run.run["versions"]["torch"] == torch.__version__
    assert run.run["arguments"] == {"quick": True}
    with pytest.raises(FileExistsError):
        Writer(path, {}, "cpu")
    path.write_text("")
    with pytest.raises(ValueError, match="expected the file of one run, got 0"):
        read(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_cover_steps_types_dtypes_and_sizes(device):
    sections = cases.plan(device, quick=False)
    every = [case for section in sections for case in section.cases]
    assert {case.device for case in every} == {device}
    assert {case.level for case in every} == {"attention", "encoder"}
    assert {case.step for case in every} == {FORWARD, BACKWARD, TRAIN}
    assert {case.pattern.sparsity_type for case in every} == set(SPARSITY_TYPES)
    assert {"bfloat16", "float16", "float32"} <= {case.dtype_name for case in every}
    assert {"layer", "base", "large"} <= {case.size_name for case in every}
    assert max(case.tokens for case in every) == 131072
    assert any(case.step == TRAIN and case.batch == 4 and case.tokens == 4096 for case in every)
    assert len({section.title for section in sections}) == len(sections)
    quick = {case for section in cases.plan(device, quick=True) for case in section.cases}
    assert len(quick) < len(every) / 3
