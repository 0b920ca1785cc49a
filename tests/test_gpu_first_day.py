"""`python -m bench.gpu` without a GPU: a rehearsal, sections that are cut, and summaries of planted results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import tune
from bench.flops import BOUNDS
from bench.gpu import first_day, sections, small, summary
from bench.gpu.sections import Section
from bench.record import Writer, read, records
from bench.static.meta import meta_call, meta_passes
from bench.timing import Spread
from lsg_attn import LSGPattern
from lsg_attn.fused.schedules import Schedule, Tuning, row_key


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The ended process of a rehearsal, and the folder with its files."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--minutes", "6", "--out", str(out)]
    return subprocess.run(command, cwd=sections.ROOT, capture_output=True, text=True), out


def test_rehearsal_runs_every_section(rehearsal):
    process, out = rehearsal
    text = (out / "summary.md").read_text()
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.strip() == text.strip()
    assert {path.name for path in out.iterdir()} == set(first_day._FILES)
    for name in ("kernel tests", "bench", "schedules"):
        assert re.search(rf"\| {name} \| done, \d+ s \|", text)
    assert re.search(r"^\*\*Green\*\*: of (\d+) kernel tests \1 passed, 0 failed, 0 skipped\.$", text, re.MULTILINE)
    assert "Not whole: memory (not run: compute-sanitizer needs a GPU)." in text
    assert "(no GPU: a rehearsal, and its times say nothing)" in text
    assert "| attention, forward, 1,024 tokens | " in text
    assert text.count("- right: ") == len(small.PATTERNS)
    assert "ours, Triton: the tensors are on device cpu" in text
    assert "forward of (1, 1, 141, 64) bfloat16 norm on sm_90: " in text
    assert "backward of (1, 1, 141, 64) bfloat16 norm on sm_90: " in text
    assert {figure["peer"] for figure in read(out / "bench.jsonl").figures} == {"lsg torch", "dense", *BOUNDS}
    assert json.loads((out / "environment.json").read_text())["versions"]["torch"] == torch.__version__


def test_runs_are_not_mixed(rehearsal, capsys):
    _, out = rehearsal
    assert first_day.main(["--rehearse", "--out", str(out)]) == 2
    assert "has environment.json, summary.md" in capsys.readouterr().out


def test_small_cases_run_every_kernel():
    launched = set()
    for pattern in small.PATTERNS:
        shape = 1, small.HEADS, pattern.num_global_tokens + small.TOKENS, small.HEAD_DIM
        call = meta_call(pattern, shape, small.DTYPE, has_mask=True, has_dropout=False)
        launched |= {launch.kernel.__name__ for each in meta_passes(call, "sm_90") for launch in each.launches}
    sources = "".join(path.read_text() for path in (sections.ROOT / "kernels").glob("*.py"))
    assert launched == set(re.findall(r"^def (_lsg_\w+_kernel)\(", sources, re.MULTILINE))


def test_what_is_missing_is_named_at_once(monkeypatch, capsys, tmp_path):
    if not torch.cuda.is_available():
        assert first_day.main(["--out", str(tmp_path)]) == 2
        assert "torch finds no GPU" in capsys.readouterr().out
    monkeypatch.setattr(first_day, "find_spec", lambda name: None if name in ("einops", "rich") else name)
    assert first_day.main(["--out", str(tmp_path)]) == 2
    assert "not installed: einops, rich; python -m pip install einops rich" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def planned(monkeypatch, out, sanitizer, missing):
    monkeypatch.setattr(first_day, "find_sanitizer", lambda: sanitizer)
    monkeypatch.setattr(first_day, "find_spec", lambda name: None if name in missing else name)
    return {section.name: section for section in first_day._sections(out)}


def test_sections_of_a_gpu(monkeypatch, tmp_path):
    found = planned(monkeypatch, tmp_path, "/cuda/compute-sanitizer", ())
    assert not any(section.missing for section in found.values())
    for name, tool in (("races", "racecheck"), ("memory", "memcheck")):
        command = found[name].command(60.0)
        assert command[0] == "/cuda/compute-sanitizer"
        assert command[command.index("--tool") + 1] == tool
    tests = found["kernel tests"].command(60.0)
    assert {name for name in tests if name.startswith("tests/")} == {
        str(path.relative_to(sections.ROOT)) for path in (sections.ROOT / "tests/kernels").glob("test_*.py")
    }
    # the commands' own arguments are understood
    for name, module in (("bench", "bench.run"), ("schedules", "bench.tune")):
        command = found[name].command(120.0)
        assert command[1:3] == ["-m", module]
        options = __import__(module, fromlist=["_parse"])._parse(command[3:])
        assert 1 < options.minutes < 2
        assert options.out.parent == tmp_path


def test_missing_pytest_and_sanitizer_are_said(monkeypatch, tmp_path):
    found = planned(monkeypatch, tmp_path, None, ("pytest", "hypothesis"))
    assert found["kernel tests"].missing.endswith("python -m pip install pytest hypothesis")
    assert found["small cases: compute-sanitizer was not found"].command(60.0)[1:] == ["-m", "bench.gpu.small"]
    assert found["memory"].missing == "compute-sanitizer was not found"
    text, is_red = told(tmp_path, list(found.values()))
    assert not is_red
    assert "**Not verified**" in text
    assert "no verdict on races: compute-sanitizer was not found" in text


def told(out, planned=()):
    """The summary of a folder, and whether it is red."""
    facts = {
        "device": "H100",
        "versions": {"torch": "2.11", "triton": "3.6"},
        "lsg_attn": "1",
        "commit": "abc",
        "target": "sm_90",
    }
    (out / "environment.json").write_text(json.dumps(facts))
    is_red = summary.write(out, planned)
    return (out / "summary.md").read_text(), is_red


WRITES = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("{out}/tune.jsonl", "w") as file:
    print("one, two", child.pid, flush=True)
    print('{{"kind": "failures", "what": "a"}}', file=file, flush=True)
    file.write('{{"kind": "failures", "wh')  # and is cut here
    file.flush()
    time.sleep(600)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a process that its parent has not waited for is there, but does not run
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_cut_section_leaves_files_that_read_back_and_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sections, "_LEAST", 0.1)
    monkeypatch.setattr(sections, "_HELD", 1.0)

    def python(code):
        return lambda limit: [sys.executable, "-c", code]

    cut = Section("cut", "cut.txt", 2, python(WRITES.format(out=tmp_path)))
    whole, failed = Section("whole", "a.txt", 1, python("print(7)")), Section("bad", "b.txt", 1, python("1 / 0"))
    begin = time.monotonic()
    states = []
    sections.run([cut, whole, failed], tmp_path, begin + 9, lambda: states.append((cut.state, whole.state)))
    assert time.monotonic() - begin < 9
    assert cut.state == "cut at its limit of 4 s"
    assert whole.state.startswith("done")
    assert failed.state.startswith("failed with status 1")
    assert states[0][0].startswith("running since")
    assert states[0][1] == "not run yet"
    assert states[1] == (cut.state, "not run yet")
    assert list(records(tmp_path / "tune.jsonl", "failures")) == [{"what": "a"}]
    printed = (tmp_path / "cut.txt").read_text().splitlines()
    child = printed[-1]
    assert child.startswith("one, two ")
    assert not is_running(int(child.split()[-1]))
    text, is_red = told(tmp_path, [cut, whole, failed])
    assert "Not whole: cut (cut at its limit of 4 s)." in text
    assert is_red  # bench.tune said that something failed


def test_sections_without_time_are_not_begun(tmp_path):
    late = Section("late", "late.txt", 1, lambda limit: ["false"])
    sections.run([late], tmp_path, time.monotonic() + 5, lambda: None)
    assert late.state == "not run: the time was over"
    assert not (tmp_path / "late.txt").exists()


def test_summary_that_fails_costs_no_section(tmp_path, capsys):
    both = [Section(name, "a.txt", 1, lambda limit: ["true"]) for name in "ab"]
    sections.run(both, tmp_path, time.monotonic() + 60, lambda: 1 / 0)
    assert [section.ended for section in both] == [0, 0]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_signal_leaves_a_summary(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGTERM, first_day._stop)
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    only = Section("only", "only.txt", 1, lambda limit: [sys.executable, "-c", stop])
    try:
        with pytest.raises(KeyboardInterrupt):
            sections.run([only], tmp_path, time.monotonic() + 60, lambda: told(tmp_path, [only]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "| only | stopped |" in (tmp_path / "summary.md").read_text()


PLAIN = """
collecting ... collected 9 items / 5 deselected / 4 selected

tests/kernels/test_a.py::test_one[a b] PASSED [ 25%]
tests/kernels/test_a.py::test_two[x] {} [ 50%]
tests/kernels/test_a.py::test_three SKIPPED (no GPU: run it) [ 75%]
tests/kernels/test_a.py::test_four PASSED [100%]
FAILED tests/kernels/test_a.py::test_two[x] - AssertionError
"""
PARALLEL = """
12 workers [4 items]
tests/kernels/test_a.py::test_one[a b]
tests/kernels/test_a.py::test_two[x]
[gw0] [ 25%] PASSED tests/kernels/test_a.py::test_one[a b]
[gw11] [ 50%] {} tests/kernels/test_a.py::test_two[x]
[gw0] [ 75%] SKIPPED tests/kernels/test_a.py::test_three
[gw1] [100%] PASSED tests/kernels/test_a.py::test_four
"""


@pytest.mark.parametrize("printed", [PLAIN, PARALLEL])
@pytest.mark.parametrize("outcome", ["FAILED", "ERROR", "PASSED"])
def test_failed_test_is_said_first_and_withholds_times(printed, outcome, tmp_path):
    (tmp_path / "tests.txt").write_text(printed.format(outcome) if outcome != "PASSED" else passing(printed))
    plant_times(tmp_path)
    text, is_red = told(tmp_path)
    verdict, rest = text.split("\n\n")[1], text.partition("## Races")[2]
    if outcome == "PASSED":
        assert verdict == "**Green**: of 4 kernel tests 3 passed, 0 failed, 1 skipped."
        assert not is_red
        assert "0.900" in rest
    else:
        assert verdict == "**RED**: of 4 kernel tests 2 passed, 1 failed, 1 skipped."
        assert "- `tests/kernels/test_a.py::test_two[x]`\n" in text
        assert is_red
        assert "0.900" not in rest
        assert "Withheld" in rest


def passing(printed):
    return printed.format("PASSED").partition("FAILED tests/")[0]


def test_cut_tests_are_not_green(tmp_path):
    (tmp_path / "tests.txt").write_text("\n".join(passing(PLAIN).splitlines()[:5]))
    text, is_red = told(tmp_path)
    assert not is_red
    assert "**Not verified**: of 4 kernel tests 2 passed, 0 failed, 0 skipped; the others did not run." in text


def test_tests_that_break_are_red(tmp_path):
    broken = Section("kernel tests", "tests.txt", 1, lambda limit: [], state="failed with status 4, 1 s", ended=4)
    text, is_red = told(tmp_path, [broken])
    assert is_red
    assert "**RED**" in text
    assert "- the kernel tests failed with status 4, 1 s: see `tests.txt`" in text


CLEAN = """========= COMPUTE-SANITIZER
right: norm: out
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("printed", "is_red", "said"),
    [
        (CLEAN, False, "- racecheck: 0 errors, 0 warnings"),
        (CLEAN.replace("(0 errors", "(2 errors"), True, "compute-sanitizer found races"),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 3 errors\n", True, "- memcheck: 3 errors"),
        ("========= COMPUTE-SANITIZER\nfailed: norm: Device not supported\n", False, "no verdict on races"),
        ("failed: norm: AssertionError: out: relative RMS error\n", True, "small case: norm: AssertionError: out"),
    ],
)
def test_findings_of_a_sanitizer_are_red(printed, is_red, said, tmp_path):
    (tmp_path / "sanitizer.txt").write_text(printed)
    text, found = told(tmp_path)
    assert found == is_red
    assert said in text


def plant_times(out, target="sm_90", head_dim=128, is_backward=True, ratio=0.9, dtype=torch.bfloat16):
    """Write a file of bench.tune in which the third schedule takes this part of the row's time of 2 ms."""
    problem = tune.Problem(LSGPattern(), (1, 16, 16385, head_dim), dtype, 0.0, is_backward)
    row, second, third, fourth, *_ = problem.schedules(target)
    trial = SimpleNamespace(problem=problem, target=target, row=row)
    writer = Writer(out / "tune.jsonl", {}, "cpu")
    times = {row: 1.0, second: 1.5, third: ratio}
    for schedule, x in times.items():
        spread = Spread(x, x - 0.01, x + 0.01)
        one = tune.Measured(schedule, Spread(*(2e-3 * value for value in spread)), spread)
        writer.write("schedules", tune.to_record(trial, one))
    writer.write("schedules", tune.to_record(trial, tune.Measured(fourth, failure="OutOfResources: shared memory")))
    writer.close()
    return row, third


@pytest.mark.parametrize(
    ("target", "head_dim", "is_backward", "dtype", "name", "shared"),
    [
        ("sm_90", 64, False, torch.bfloat16, "_HOPPER", []),
        ("sm_90", 256, True, torch.bfloat16, "_BACKWARD_HOPPER", ["_BACKWARD_BLACKWELL"]),
        ("sm_100", 256, True, torch.float16, "_BACKWARD_BLACKWELL", ["_BACKWARD_HOPPER"]),
        ("sm_90", 128, True, torch.bfloat16, "_BACKWARD_HOPPER", []),
        ("sm_90", 100, False, torch.float32, "_FLOAT32", []),
    ],
)
def test_summary_names_the_row_to_change(target, head_dim, is_backward, dtype, name, shared, tmp_path):
    row, third = plant_times(tmp_path, target, head_dim, is_backward, 0.9, dtype)
    text, _ = told(tmp_path)
    limit, _ = row_key(head_dim, False)
    found = re.search(r"on (\S+): change `(\w+)\[(.*?)\]`: (\S+) ms to (\S+) ms, (.*?) of the row's time", text)
    assert found.groups() == (target, name, f"({limit}, False)", "2", "1.8", "0.900 (0.890-0.910)")
    assert "3 of" in text
    assert "; 1: OutOfResources: shared memory." in text
    _, now, new, *_ = text.partition("```python")[2].splitlines()
    rows = {"Schedule": Schedule, "Tuning": Tuning}
    assert eval("{" + now.partition("# now: ")[2] + "}", rows) == {(limit, False): row}
    assert eval("{" + new.partition("  # ")[0] + "}", rows) == {(limit, False): third}
    for other in shared:
        assert f"`{other}`" in text.partition("The same row is in")[2]


def test_summary_keeps_a_row_that_is_not_beaten(tmp_path):
    plant_times(tmp_path, ratio=0.995)  # with percentiles of 0.985 and 1.005
    text, _ = told(tmp_path)
    assert "on sm_90: keep `_BACKWARD_HOPPER[(128, False)]`: 2 ms. 3 of" in text
    assert "```python" not in text


def test_forward_tries_no_tile_that_is_halved():
    problem = tune.Problem(LSGPattern(), (1, 16, 16385, 64), torch.bfloat16, 0.0, False)
    assert problem.row("sm_90") in problem.schedules("sm_90")
    assert {schedule.block_m for schedule in problem.schedules("sm_90")} == {64, 128}
