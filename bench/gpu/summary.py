"""The summary of bench.gpu: what is red, what did not run, times beside the peers', and rows for schedules.py."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.gpu.sections import BENCH, ENVIRONMENT, SANITIZER, SUMMARY, TESTS, TUNE, Section
from bench.record import Run, read, records
from bench.tune import Recorded, best_of, from_record, row_text, why_best
from lsg_attn.fused import schedules
from lsg_attn.fused.schedules import Schedule, row_key

_OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED)"
# of one process, and of many; the summary at the end repeats failures in another form
_TEST = re.compile(rf"(tests/\S+::.*?) {_OUTCOME}\b|\[gw\d+\] \[ *\d+%\] {_OUTCOME} (tests/.*)")
_COLLECTED = re.compile(r"collected .*?(\d+) selected|collected (\d+) items?|workers? \[(\d+) items?\]")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: .*?\((\d+) errors?, (\d+) warnings?\)")
_ERRORS = re.compile(r"= ERROR SUMMARY: (\d+) errors?$", re.MULTILINE)


@dataclass
class Tests:
    """What pytest has printed so far."""

    collected: int = 0
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The counts."""
        return (
            f"of {self.collected} kernel tests {self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        )

    @property
    def is_whole(self) -> bool:
        """Whether every test was run or skipped."""
        return 0 < self.collected <= self.passed + self.skipped + len(self.failed)


def write(out: Path, sections: Sequence[Section]) -> bool:
    """Write the summary of what the folder has so far; return whether something is red."""
    tests, checked = read_tests(_text(out / TESTS)), _text(out / SANITIZER)
    red_tests = _red_tests(tests, sections)
    red = [*red_tests, *_red_cases(checked)]
    red += [what for what in _failures(out / BENCH) if what.startswith("lsg")]  # a peer's failure is not ours
    red += _failures(out / TUNE)
    lines = [f"# A GPU's first day: {_device(out)}", "", *_verdict(red, tests, sections), ""]
    lines += ["| section | state | file |", "|---|---|---|"]
    lines += [f"| {section.name} | {section.state} | `{section.file}` |" for section in sections]
    lines += ["", "## Races and accesses", "", *_checked(checked), ""]
    if red_tests:
        lines += ["## Times and schedules", "", f"Withheld, as kernel tests are red: see `{BENCH}` and `{TUNE}`."]
    else:
        lines += ["## Times", "", *_times(out / BENCH), ""]
        lines += ["## Changes in `lsg_attn/fused/schedules.py`", "", *changes(out / TUNE)]
    part = out / f"{SUMMARY}.part"
    part.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    os.replace(part, out / SUMMARY)  # a stop leaves the old or the new one, whole
    return bool(red)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _failures(path: Path) -> list[str]:
    return [record["what"] for record in records(path, "failures")] if path.exists() else []


def _device(out: Path) -> str:
    facts = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton"))
    note = "" if "target" in facts else " (no GPU: a rehearsal, and its times say nothing)"
    return f"{facts['device']}, {versions}, lsg_attn {facts['lsg_attn']} at {facts['commit']}{note}"


def read_tests(text: str) -> Tests:
    """Count the tests in pytest's lines, printed by one process or by many."""
    tests = Tests()
    for line in text.splitlines():
        if found := _COLLECTED.search(line):
            tests.collected = int(found[1] or found[2] or found[3])
        elif found := _TEST.match(line.rstrip()):
            name, outcome = found[1] or found[4], found[2] or found[3]
            tests.passed += outcome == "PASSED"
            tests.skipped += outcome == "SKIPPED"
            if outcome in ("FAILED", "ERROR") and name not in tests.failed:  # an error may come after a failure
                tests.failed.append(name)
    return tests


def _red_tests(tests: Tests, sections: Iterable[Section]) -> list[str]:
    if tests.failed:
        return [f"`{name}`" for name in tests.failed]
    return [f"the {x.name} {x.state}: see `{TESTS}`" for x in sections if x.file == TESTS and x.ended]


def _red_cases(text: str) -> list[str]:
    """Hazards and errors, and wrong results; but not what fails because the sanitizer cannot run here."""
    red = [f"compute-sanitizer found races: `{SANITIZER}`" for found in _HAZARDS.finditer(text) if int(found[1])]
    red += [f"compute-sanitizer found bad accesses: `{SANITIZER}`" for x in _ERRORS.finditer(text) if int(x[1])]
    if "COMPUTE-SANITIZER" not in text or _HAZARDS.search(text):
        red += [f"small case: {line[8:]}" for line in text.splitlines() if line.startswith("failed: ")]
    return red


def _verdict(red: Sequence[str], tests: Tests, sections: Iterable[Section]) -> list[str]:
    parts = [f"{section.name} ({section.state})" for section in sections if not section.is_whole]
    parted = ["", f"Not whole: {'; '.join(parts)}."] if parts else []
    if red:
        more = [f"- and {len(red) - 20} more"] if len(red) > 20 else []
        return [f"**RED**: {tests.describe()}.", "", *(f"- {what}" for what in red[:20]), *more, *parted]
    if not tests.is_whole or not tests.passed:
        return [f"**Not verified**: {tests.describe()}; the others did not run.", *parted]
    return [f"**Green**: {tests.describe()}.", *parted]


def _checked(text: str) -> list[str]:
    """What the small cases and the sanitizer said."""
    cases = Counter(line for line in text.splitlines() if line.startswith(("right: ", "failed: ")))
    lines = [f"- {line}" + (f" ({count} times)" if count > 1 else "") for line, count in cases.items()]
    lines += [f"- racecheck: {x[1]} errors, {x[2]} warnings" for x in _HAZARDS.finditer(text)]
    lines += [f"- memcheck: {x[1]} errors" for x in _ERRORS.finditer(text)]
    if not _HAZARDS.search(text):
        lines.append("- no verdict on races: compute-sanitizer was not found, could not run or was cut")
    elif any(int(x[1]) + int(x[2]) for x in _HAZARDS.finditer(text)):
        # triton-lang/triton issue 7264, NVIDIA/compute-sanitizer-samples issue 19
        lines.append("- known false alarms: writes of equal values in Triton's reductions, and wgmma's operands")
    return lines


def _times(path: Path) -> list[str]:
    run = _read(path)
    return ["Nothing was measured."] if run is None else report.every_case(run)


def _read(path: Path) -> Run | None:
    """A run's file, unless the run was stopped before its first line."""
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def changes(path: Path) -> list[str]:
    """For each problem whose schedules were tried: the row to change, and to what, or that it stays."""
    if not path.exists() or not (runs := list(records(path, "run"))):
        return ["No schedule was tried."]
    tried: dict[Any, list[Recorded]] = {}
    for one in map(from_record, records(path, "schedules")):
        tried.setdefault(one.problem, []).append(one)
    lines = [line for each in tried.values() for line in _change(each, runs[0])]
    return lines or ["No schedule was tried."]


def _change(tried: Sequence[Recorded], run: dict[str, Any]) -> list[str]:
    """What one problem's times say about its row."""
    target, problem, row = tried[0][:3]
    measured = [one.measured for one in tried]
    timed = [x for x in measured if x.seconds is not None]
    reasons = Counter(x.failure for x in measured if x.failure)
    counts = f"{len(timed)} of {len(problem.schedules(target))} schedules timed"
    counts += "".join(f"; {count}: {reason}" for reason, count in reasons.most_common(3))
    head_dim, has_dropout, is_float32 = problem.shape[3], problem.dropout_p > 0, problem.dtype == torch.float32
    kind = schedules._kind_of(target, is_float32)
    rows = kind.backward if problem.is_backward else kind.forward
    key = row_key(head_dim, has_dropout)
    name, *others = _names(rows, key)
    best = best_of(measured)
    what, where = f"{problem.describe()} on {target}", f"`{name}[{key}]`"
    of_row = next((x.seconds for x in timed if x.schedule == row), None)
    now = "its row was not timed" if of_row is None else f"{1e3 * of_row.median:.4g} ms"
    if best is None or best.seconds is None or best.to_row is None:
        return [f"- {what}: keep {where}: {now}. {counts}."]
    ratio = f"{best.to_row.median:.3f} ({best.to_row.p20:.3f}-{best.to_row.p80:.3f}) of the row's time"
    comment = why_best(best, row, problem.describe(), run["device"], run["versions"]["torch"])
    lines = [
        f"- {what}: change {where}: {now} to {1e3 * best.seconds.median:.4g} ms, {ratio}. {counts}.", "",
        "  ```python", f"  # now: {_old(row, key)}", row_text(best.schedule, head_dim, has_dropout, comment)[2:],
        "  ```",
    ]  # fmt: skip
    if others:
        shared = ", ".join(f"`{other}`" for other in others)
        lines += ["", f"  The same row is in {shared}: keep it there, on GPUs that were not measured."]
    return [*lines, ""]


def _old(row: Schedule, key: tuple[int, bool]) -> str:
    return row_text(row, *key, "").split("  #")[0].strip()


def _names(rows: dict[tuple[int, bool], Schedule], key: tuple[int, bool]) -> list[str]:
    """The dictionary's name, then those of the others that have the very row: one takes it from another."""
    found = {name: x for name, x in vars(schedules).items() if isinstance(x, dict) and x.get(key) is rows[key]}
    return sorted(found, key=lambda name: found[name] is not rows)
