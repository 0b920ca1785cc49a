"""A run's file: one JSON object per line, the run first, then figures and skipped peers as they come."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cases import TimedCase
from lsg_attn import __version__

FOLDER = Path("build/bench")
_PACKAGES = ("torch", "triton", "transformers", "lsg-converter", "numpy")


def new_path(kind: str) -> Path:
    """Where a run is written unless told otherwise."""
    return FOLDER / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"


class Writer:
    """Writes records to a new file.

    Raises:
        FileExistsError: the file exists; the figures of two runs must not mix.
    """

    def __init__(self, path: Path, arguments: dict[str, Any], device: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("x", encoding="utf-8", buffering=1)
        self.run = describe_run(arguments, device)
        self.write("run", self.run)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Add a record; its case becomes a dictionary."""
        self._file.write(json.dumps({"kind": kind, **record}, default=TimedCase.describe) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Run(NamedTuple):
    """The contents of a run's file."""

    run: dict[str, Any]
    figures: list[dict[str, Any]]  # each has a section, what it compares, a case, a peer and its figures
    skipped: list[dict[str, Any]]  # each has the same without figures, and a reason

    def common_length(self) -> int:
        """The length that most figures of peers have; of several such lengths the longest.

        Raises:
            ValueError: no figures are of a section that compares peers.
        """
        lengths: list[int] = [figure["case"].tokens for figure in self.figures if figure["compares"] == "peers"]
        if not lengths:
            raise ValueError("expected a run with figures of a section that compares peers, got none")
        return max(set(lengths), key=lambda length: (lengths.count(length), length))


def read(path: Path) -> Run:
    """Read a run's file.

    Raises:
        ValueError: it is not the file of one run.
    """
    runs, figures, skipped = (list(records(path, kind)) for kind in ("run", "figures", "skipped"))
    if len(runs) != 1:
        raise ValueError(f"{path}: expected the file of one run, got {len(runs)} records of kind 'run'")
    return Run(runs[0], figures, skipped)


def records(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The records of one kind. A last line without an end is left out: the run was stopped while it wrote it."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        record = json.loads(line)
        if record.pop("kind") == kind:
            if "case" in record:
                record["case"] = TimedCase.from_record(record["case"])
            yield record


def describe_run(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The time, machine, versions and arguments of a run."""
    root = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
        commit = git.stdout.strip()
    except FileNotFoundError:
        commit = ""
    memory = Path("/proc/meminfo")
    total = memory.read_text().split("MemTotal:")[1].split()[0] if memory.exists() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if total is None else round(int(total) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "lsg_attn": __version__,
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": (torch.version.cuda or torch.version.hip) if device == "cuda" else None,
        "commit": commit or "unknown",
        "arguments": arguments,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name, and the widest vector instructions that torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
