"""Runs sections, each a process with its part of the time: at its limit it is killed, and what it wrote stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# A machine that copies files back may take few: these are all, besides the sections' own.
ENVIRONMENT, SUMMARY = "environment.json", "summary.md"
TESTS, SANITIZER, BENCH, TUNE = "tests.txt", "sanitizer.txt", "bench.jsonl", "tune.jsonl"
_LEAST = 10.0  # seconds: in less, no section says anything
_HELD = 5.0  # seconds to wait for a killed process, which a driver can hold


@dataclass
class Section:
    """A command, which gets its limit in seconds, the file for what it prints, and its share of the time.

    ``missing``: why it cannot run. ``state``: what became of it. ``ended``: its status, if it ended by itself.
    """

    name: str
    file: str
    share: float
    command: Callable[[float], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    state: str = "not run yet"
    ended: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it ended by itself."""
        return self.ended is not None


def run(sections: Sequence[Section], out: Path, end: float, tell: Callable[[], object]) -> None:
    """Run sections in order until ``end``, a time of :func:`time.monotonic`; ``tell`` is called when a state changes.

    What a section leaves of its share goes to the later ones.
    """
    for section in sections:
        if section.missing:
            section.state = f"not run: {section.missing}"
    left = [section for section in sections if not section.missing]
    while left:
        section, *later = left
        share = section.share / sum(x.share for x in left)
        limit, left = share * (end - _HELD - time.monotonic()), later
        if limit < _LEAST:
            section.state = "not run: the time was over"
            continue
        section.state = f"running since {datetime.now():%H:%M:%S}, for at most {limit:.0f} s"
        _tell(tell)
        try:
            _run_one(section, out, limit)
        except KeyboardInterrupt:
            section.state = "stopped"
            raise
        finally:
            _tell(tell)


def _tell(tell: Callable[[], object]) -> None:
    try:
        tell()
    except Exception:  # a summary that cannot be written must not cost the sections that follow
        traceback.print_exc()


def _run_one(section: Section, out: Path, limit: float) -> None:
    """Run a section's command to its end or its limit, and say which it was."""
    begin, command = time.monotonic(), section.command(limit)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **section.environment}
    with (out / section.file).open("a", encoding="utf-8") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        section.ended = process.wait(limit)
    except subprocess.TimeoutExpired:
        section.state = f"cut at its limit of {limit:.0f} s"
    else:
        status = f"failed with status {section.ended}" if section.ended else "done"
        section.state = f"{status}, {time.monotonic() - begin:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_HELD)
