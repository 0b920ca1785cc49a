"""The commands of the bench: a whole run, its pictures and report, scaling, recall and tuning."""

import json
import os
import re
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import fresh, measure, packed, peers, plot, recall, report, run, scaling, tune
from bench.cases import Section, TimedCase, plan, shrink
from bench.flops import BOUNDS
from bench.measure import Result
from bench.peers.base import masked_attention
from bench.record import read
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.fused.schedules import Schedule, Tuning, forward_schedule

RESULTS = Path(report.__file__).parent / "results"
RUN = RESULTS / "amd-epyc.jsonl"


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Status, file and printed text of a dry run: every case of the GPU's plan, with tiny shapes on the CPU.

    Nothing is compiled for it by torch.compile, which would take a minute; test_bench.py checks FlexAttention compiled.
    """
    path = tmp_path_factory.mktemp("bench") / "dry.jsonl"
    console = Console(record=True, width=140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Console", lambda **_: console)
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        code = run.main(["--device", "cuda", "--dry-run", "--out", str(path)])
    return code, path, console.export_text()


def test_dry_run_measures_every_case_of_a_gpus_plan(dry_run):
    code, path, printed = dry_run
    assert code == 0
    found = read(path)
    expected = {(section.title, case) for section in shrink(plan("cuda", False)) for case in section.cases}
    assert {(figure["section"], figure["case"]) for figure in found.figures} == expected
    ran = {figure["peer"] for figure in found.figures}
    assert ran == {*peers.NAMES, *BOUNDS} - {"lsg triton"}
    for name in peers.NAMES:
        assert name in printed
    assert "skipped: lsg triton: the tensors are on device cpu" in printed
    assert "skipped: flex: FlexAttention has no backward on a CPU" in printed
    numbers = [figure[key] for figure in found.figures for key in ("us_per_token", "tflops")]
    assert all(number > 0 for number in numbers)
    # in each case every peer that was asked has figures or a reason
    asked = {(record["section"], record["case"], record["peer"]) for record in (*found.figures, *found.skipped)}
    for section in shrink(plan("cuda", False)):
        for case in section.cases:
            names = {peer.name for peer in measure.asked(section, case, peers.NAMES)}
            assert {(section.title, case, name) for name in names} <= asked


def test_existing_files_and_missing_gpus_exit_with_status_2(tmp_path, capsys):
    path = tmp_path / "there.jsonl"
    path.write_text("mine")
    assert run.main(["--quick", "--out", str(path)]) == 2
    assert "exists already" in capsys.readouterr().out
    assert path.read_text() == "mine"
    if not torch.cuda.is_available():
        assert run.main(["--device", "cuda", "--out", str(tmp_path / "new.jsonl")]) == 2
        assert tune.main([]) == 2
        assert capsys.readouterr().out.count("torch finds no GPU") == 2


def test_only_needs_part_of_a_title(tmp_path, capsys):
    assert run.main(["--only", "atention", "--out", str(tmp_path / "new.jsonl")]) == 2
    assert "got 'atention'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


SECTION = Section("s", (TimedCase("attention", "tiny", 256),), memory=(256,), seconds=0, least=1)


def measured(monkeypatch, *results, peak=lambda name, case: 1):
    """A function that runs bench.run on a case whose processes return these results or raise these errors."""
    told = iter(results)
    asked_for = []

    def call(function, section, case, names, verdicts):
        asked_for.append(list(names))
        result = next(told)
        if isinstance(result, Exception):
            raise result
        return result

    worker = SimpleNamespace(call=call, stop=lambda: asked_for.append("stop"))
    monkeypatch.setattr(run.fresh, "call", call)
    monkeypatch.setattr(run, "peak_bytes", peak)

    def measure_on(device):
        (case,) = SECTION.cases
        names = ["lsg torch", "dense", "flex"]
        in_worker = worker if device == "cuda" else None
        return run._measure(SECTION, replace(case, device=device), names, {}, in_worker), asked_for

    return measure_on


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_case_is_skipped_if_its_process_dies(device, monkeypatch):
    result, _ = measured(monkeypatch, BrokenProcessPool("killed\nmore"))(device)
    assert {record["peer"]: record["reason"] for record in result.skipped} == dict.fromkeys(
        ("lsg torch", "dense", "flex"), "BrokenProcessPool: killed"
    )
    assert [failure["what"] for failure in result.failures] == ["s, 256 tokens"]


def test_times_are_kept_if_a_peak_cannot_be_measured(monkeypatch):
    def peak(name, case):
        if name == "dense":
            raise BrokenProcessPool("killed")
        return 5

    figures = [{"peer": "dense"}, {"peer": "flex"}, {"peer": "matmul"}]
    result, _ = measured(monkeypatch, Result(figures=figures), peak=peak)("cpu")
    assert result.figures == [{"peer": "dense"}, {"peer": "flex", "peak_bytes": 5}, {"peer": "matmul"}]
    assert [failure["what"] for failure in result.failures] == ["s, 256 tokens: the peak memory of dense"]


def test_peer_that_loses_the_gpu_is_skipped_and_the_others_are_measured_again(monkeypatch):
    lost = Result(skipped=[{"peer": "dense", "reason": "r"}], failures=[{"what": "w"}], is_gpu_lost=True)
    found = Result(figures=[{"peer": "flex"}], verdicts={("flex",): None})
    result, asked_for = measured(monkeypatch, lost, found)("cuda")
    assert asked_for == [["lsg torch", "dense", "flex"], "stop", ["lsg torch", "flex"]]
    assert result == replace(found, skipped=lost.skipped, failures=lost.failures)


def test_worker_keeps_its_process_until_it_is_stopped_or_killed():
    worker = fresh.Worker()
    try:
        first = worker.call(os.getpid)
        assert worker.call(os.getpid) == first != os.getpid()
        with pytest.raises(BrokenProcessPool):
            worker.call(os._exit, 1)
        second = worker.call(os.getpid)
        assert second != first
        worker.stop()
        assert worker.call(os.getpid) != second
    finally:
        worker.stop()


def test_cases_after_the_last_minute_are_skipped(tmp_path, capsys):
    path = tmp_path / "late.jsonl"
    assert run.main(["--quick", "--minutes", "-1", "--peers", "dense", "led", "--out", str(path)]) == 0
    found = read(path)
    assert not found.figures
    assert {record["peer"] for record in found.skipped} == {"dense", "led"}
    assert "the -1 minutes were over" in capsys.readouterr().out


def test_plot_draws_the_figures_that_a_file_has(dry_run, tmp_path):
    _, path, _ = dry_run
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records.copy():
        if record["kind"] == "figures" and record["section"] == "attention, forward":
            record["peak_bytes"] = 1 << 20
            records.append({**record, "case": {**record["case"], "tokens": 2048}})  # a second length
    copy = tmp_path / "two.jsonl"
    copy.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [x.name for x in plot.plot(copy, tmp_path)] == ["two-time.png", "two-memory.png", "two-ratios.png"]
    last = [record for record in records if record.get("case", {}).get("tokens") == 2048]
    records += [{**record, "case": {**record["case"], "tokens": 4096}} for record in last]
    copy = copy.rename(tmp_path / "three.jsonl")
    copy.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [x.name for x in plot.plot(copy, tmp_path)][3:] == ["three-small.png"]
    assert [x.name for x in plot.plot(path, tmp_path)] == ["dry-ratios.png"]
    assert (tmp_path / "two-time.png").read_bytes().startswith(b"\x89PNG")


def test_documents_have_the_figures_of_the_files():
    report.main(["--check"])


@pytest.mark.parametrize("document", ["README", "PAGE"])
def test_a_changed_figure_in_a_document_is_found(document, monkeypatch, tmp_path):
    text = getattr(report, document).read_text(encoding="utf-8")
    before, begin, figures = text.partition(report._BEGIN)
    copy = tmp_path / f"{document}.md"
    changed = re.sub(r"[\d.]+ ms", "12345 ms", figures, count=1)
    copy.write_text(before + begin + changed, encoding="utf-8")
    monkeypatch.setattr(report, document, copy)
    with pytest.raises(SystemExit, match=rf"{copy.name}: its figures differ from bench/results"):
        report.main(["--check"])
    assert "12345 ms" in copy.read_text(encoding="utf-8")
    report.main([])
    assert copy.read_text(encoding="utf-8") == text


def test_report_refuses_dry_runs_and_texts_without_its_place(dry_run):
    old = f"before\n{report._BEGIN}old\n{report._END}after\n"
    lines = report.report(RUN)
    text = report.with_section(old, lines)
    assert text.startswith(f"before\n{report._BEGIN}")
    assert text.endswith(f"{report._END}after\n")
    assert report.with_section(text, lines) == text
    for make in (report.report, lambda path: report.summary([path])):
        with pytest.raises(ValueError, match="dry run"):
            make(dry_run[1])
    with pytest.raises(ValueError, match="expected a section"):
        report.with_section("no marks", lines)


def test_summary_has_a_table_for_each_kind_of_device(tmp_path):
    """The newest run of each that compares peers."""
    older, newer = (RESULTS / f"{name}.jsonl" for name in ("intel-xeon", "amd-epyc"))
    others = tmp_path / "others.jsonl"  # a newer run that compares no peers
    records = [json.loads(line) for line in newer.read_text().splitlines()]
    kept = [x for x in records if x["kind"] == "run" or x.get("compares") == "types"]
    others.write_text("".join(json.dumps(x) + "\n" for x in kept))
    gpu = tmp_path / "gpu.jsonl"
    gpu.write_text(older.read_text().replace('"cuda": null', '"cuda": "13.0"'))
    cpu_table, gpu_table = report.summary([newer]), report.summary([gpu])
    assert report.summary([older, newer, others]) == report.summary([newer, older]) == cpu_table
    assert report.summary([older, newer, gpu]) == cpu_table + gpu_table
    assert cpu_table[0].startswith("AMD EPYC (AVX512), 2 threads, 4,096 tokens")
    assert gpu_table != report.summary([older])


@pytest.mark.parametrize("key", ["ms", "ratio", "peak_bytes"])
def test_report_is_made_of_the_figures(key, tmp_path):
    path = RUN
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record.get(key) and record["peer"] == "lsg cpp":
            value = record[key]
            record[key] = [1.7 * x for x in value] if isinstance(value, list) else 2 * value
        elif record.get(key) and record["peer"] == "original":
            record[key] = record[key] if isinstance(record[key], int) else [3.1 * x for x in record[key]]
    changed = tmp_path / path.name
    changed.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.report(changed) != report.report(path)
    assert report.summary([changed]) != report.summary([path])


def test_report_names_who_is_faster(tmp_path):
    path = RUN
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "figures" and record["peer"] not in ("lsg cpp", *BOUNDS):
            record["ratio"] = [0.5] * 3 if record["peer"] == "led" and record["section"] == "train step" else [2.0] * 3
    changed = tmp_path / path.name
    changed.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = report.report(changed)
    begin = lines.index("Peers that are faster than ours:")
    assert lines[begin + 2 : begin + 4] == ["- LED: train step, 4,096 tokens, float32: 0.50", ""]
    assert "Faster than ours in some measured cases: LED." in report.summary([changed])[0]


def test_committed_runs_have_cases_of_the_plan_and_no_failure_of_ours():
    """One has not all of them: it is older than some cases."""
    incomplete = set()
    for path in RESULTS.glob("*.jsonl"):
        found = read(path)
        assert not found.run["commit"].endswith("-dirty")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert not any(x["kind"] == "failures" and x["what"].startswith("lsg") for x in records)
        arguments = found.run["arguments"]
        sections = [x for x in plan(arguments["device"], arguments["quick"]) if arguments["only"] in x.title]
        expected = {(section.title, case) for section in sections for case in section.cases}
        measured = {(figure["section"], figure["case"]) for figure in found.figures}
        assert measured <= expected
        incomplete |= {path.stem} if measured < expected else set()
    assert incomplete == {"intel-xeon"}


def test_scaling_prints_the_sections_of_a_file(capsys):
    scaling.main([str(RUN)])
    out = capsys.readouterr().out
    assert "attention, forward" in out
    assert "dense" in out


def test_scaling_finds_exponents_and_crossings():
    lengths = (512, 1024, 2048, 4096)
    linear = {n: 3.0 * n for n in lengths}
    square = {n: n * n / 500 for n in lengths}
    assert scaling.exponent(linear) == pytest.approx(1)
    assert scaling.exponent(square) == pytest.approx(2)
    assert scaling.crossing(linear, square) == "from about 1500 on (measured: 1024 not, 2048 yes)"
    assert scaling.crossing(linear, {n: 4.0 * n for n in lengths}) == "at all lengths from 512 on"
    assert scaling.crossing(square, linear) == "not up to 4096"


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_recall_of_each_type_against_dense_probabilities(sparsity_type):
    torch.manual_seed(0)
    pattern = LSGPattern(8, 8, 2, sparsity_type, 1)
    tokens, heads = 64, 2
    query, key, value = torch.randn(3, 1, heads, 1 + tokens, 16)
    got = recall.recall(pattern, (query, key, value))
    assert 0 < got.seen <= got.covered + 1e-6 <= 1 + 2e-6
    assert (got.seen == got.covered) == (sparsity_type not in ("pooling", "bos_pooling", "lsh"))
    # the dense probabilities of local and global keys
    if sparsity_type == "none":
        block = torch.arange(tokens) // 8
        near = torch.ones(1 + tokens, 1 + tokens, dtype=torch.bool)
        near[1:, 1:] = (block[:, None] - block).abs() <= 1
        probs = (query @ key.mT / 4).softmax(-1)
        expected = (probs * near)[:, :, 1:].sum(-1).mean().item()
        assert got.seen == pytest.approx(expected, rel=1e-5)
    # with equal scores the probability is a share of the keys
    even = recall.recall(pattern, (torch.zeros_like(query), key, value))
    assert even.covered <= (1 + 24 + 32) / 65


def test_recall_of_a_pattern_that_sees_everything():
    qkv = tuple(torch.randn(3, 1, 2, 1 + 30, 16))
    seen, covered, error = recall.recall(LSGPattern(16), qkv)
    assert (seen, covered) == pytest.approx((1, 1))
    assert error < 1e-5


def test_recall_prints_a_row_for_each_type(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    recall.main(["--file", str(text), "--tokens", "200", "--block-size", "16", "--factors", "2"])
    out = capsys.readouterr().out
    for name in SPARSITY_TYPES:
        assert name in out
    assert "its weights are random" in out


def test_dense_layers_compute_dense_attention():
    options = recall._parse(["--tokens", "150"])
    encoder, ids, _ = recall._read(options)
    outputs = []
    for layer in encoder.layers:
        layer.self_attn.out_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    layers = list(recall.dense_layers(encoder, ids))
    for (query, key, value), out in zip(layers, outputs, strict=True):
        everything = torch.ones(query.shape[2], query.shape[2])
        expected = masked_attention(query, key, value, everything).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_tune_tries_neighbours_and_its_row_is_valid_python():
    row = forward_schedule("sm_90", torch.bfloat16, 64, 128, False)
    schedules = tune.neighbours(row)
    assert schedules[0] == row
    assert len(set(schedules)) == len(schedules) > 10
    assert all(tune._distance(row, schedule) <= 2 for schedule in schedules)
    text = tune.row_text(Schedule(64, 32, Tuning(8, 2)), 80, True, "measured on paper")
    assert eval("{" + text.split("#")[0] + "}") == {(128, True): Schedule(64, 32, Tuning(8, 2))}


@pytest.mark.parametrize("arguments", [[], ["--passes", "forward", "backward"], ["--type", "lsh", "--dropout"]])
def test_tune_dry_run_lists_schedules(arguments, capsys):
    assert tune.main(["--dry-run", "sm_90", "--tokens", "1024", *arguments]) == 0
    out = capsys.readouterr().out
    assert "_kernel" in out
    assert out.count("│") > 60


def test_packed_prints_a_row_for_each_batch_and_step(capsys):
    packed.main(["--lengths", "40", "7", "--seconds", "0"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "packed" in line or "padded" in line][1:]
    assert [line.split("│")[2].strip() for line in rows] == ["packed", "padded"] * 2
    assert [int(line.split("│")[3]) for line in rows] == [49, 82] * 2
