"""python -m bench.gpu --out DIR: a GPU's first day: tests, races, times and schedules, within so many minutes.

The summary is written before and after each section, so that a stop at any moment leaves a true one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.sections import BENCH, ENVIRONMENT, ROOT, SANITIZER, SUMMARY, TESTS, TUNE, Section, run

# torch, and modules that import it, are imported where they are used: before that it is said what is not installed.

_BEGIN = time.monotonic()  # imports take their part of the minutes
_NEEDED = ("torch", "triton", "numpy", "einops", "rich")
_PEERS = ("lsg triton", "dense", "flex", "original")
_BENCH_LOG, _TUNE_LOG = "bench.txt", "tune.txt"
_FILES = (ENVIRONMENT, SUMMARY, TESTS, SANITIZER, BENCH, _BENCH_LOG, TUNE, _TUNE_LOG)
_NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # those that happen to be installed there
# A line for each test as it ends; and what other versions warn of is no error, as it is in pyproject.toml.
_PYTEST = ["-vv", "--color=no", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections.

    Returns:
        0; 1 if a test, a check or a section failed; 2 if something is missing or the folder has files of another run.
    """
    options = _parse(arguments)
    if reason := _missing(options):
        print(f"bench.gpu: {reason}")
        return 2
    from bench.gpu.summary import write

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / ENVIRONMENT).write_text(json.dumps(_environment(), indent=1) + "\n", encoding="utf-8")
    sections = _rehearsal(options.out) if options.rehearse else _sections(options.out)
    signal.signal(signal.SIGTERM, _stop)
    run(sections, options.out, _BEGIN + 60 * options.minutes, lambda: write(options.out, sections))
    is_red = write(options.out, sections)
    print((options.out / SUMMARY).read_text(encoding="utf-8"))
    return 1 if is_red or any(section.ended for section in sections) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="end within so many (default: %(default)s)")
    parser.add_argument("--out", type=lambda x: Path(x).resolve(), required=True, help="the folder to write to")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: each section tiny, on the CPU")
    return parser.parse_args(arguments)


def _missing(options: argparse.Namespace) -> str:
    """Why nothing can run, or nothing."""
    if reason := _not_installed(*_NEEDED):
        return reason
    if options.rehearse and find_spec("ttsem") is None:
        return "not installed: ttsem; python -m pip install --no-deps --ignore-requires-python ttsem==0.1.0"
    present = [name for name in _FILES if (options.out / name).exists()]
    if present:
        return f"--out: {options.out} has {', '.join(present)} already, and runs are not mixed"
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        return "torch finds no GPU; --rehearse runs each section tiny on the CPU"
    return ""


def _not_installed(*names: str) -> str:
    """What to install of these, or nothing."""
    missing = [name for name in names if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; python -m pip install {' '.join(missing)}" if missing else ""


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _sections(out: Path) -> list[Section]:
    """A GPU's sections, the most valuable first.

    The tests took 276 s on an H200's machine, in 15 processes on 16 cores, most of it to compile.
    """
    jobs = max(1, min(15, len(os.sched_getaffinity(0)) - 1))
    files = sorted((ROOT / "tests/kernels").glob("test_*.py"), key=lambda path: ("bench" in path.name, path.name))
    tests = [sys.executable, "-m", "pytest", *_PYTEST, *(str(path.relative_to(ROOT)) for path in files)]
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in each of many processes
    parallel = find_spec("xdist") is not None and jobs > 1
    if parallel:  # compiling takes most of the time
        tests += ["-p", "xdist", "-n", str(jobs)]
    small, sanitizer = [sys.executable, "-m", "bench.gpu.small"], find_sanitizer()
    checker = [] if sanitizer is None else [sanitizer, "--target-processes", "application-only", "--print-limit", "20"]
    not_found = "compute-sanitizer was not found"
    # Each tensor in an allocation of its own has bounds that a sanitizer knows.
    bounds = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = [sys.executable, "-m", "bench.run", "--device", "cuda", "--peers", *_PEERS]
    tune = [sys.executable, "-m", "bench.tune", "--head-dim", "64", "128", "--passes", "forward", "backward"]
    tune += ["--jobs", str(jobs)]
    return [
        Section(
            "kernel tests", TESTS, 55, lambda _: tests, _NO_PLUGINS | (alone if parallel else {}),
            _not_installed("pytest", "hypothesis"),
        ),
        Section(
            "races" if checker else f"small cases: {not_found}", SANITIZER, 8,
            lambda _: [*checker, "--tool", "racecheck", *small] if checker else small,
        ),
        Section("bench", _BENCH_LOG, 25, lambda limit: [*bench, *_within(limit, 20), "--out", str(out / BENCH)]),
        Section("schedules", _TUNE_LOG, 10, lambda limit: [*tune, *_within(limit, 10), "--out", str(out / TUNE)]),
        Section(
            "memory", SANITIZER, 4, lambda _: [*checker, "--tool", "memcheck", *small], bounds,
            "" if checker else not_found,
        ),
    ]  # fmt: skip


def _rehearsal(out: Path) -> list[Section]:
    """The same sections on a CPU: kernels are executed by ttsem, and the bench's cases are tiny."""
    python = sys.executable
    files = ("tests/kernels/test_primitives.py", "tests/kernels/test_compress.py")
    tests = [python, "-m", "ttsem.sanitize", "pytest", *_PYTEST, *files, "-k", "offsets or nan or B18"]
    small = [python, "-m", "bench.gpu.rehearsal", "bench.gpu.small"]
    bench = [python, "-m", "bench.run", "--device", "cuda", "--dry-run", "--only", "attention, forward"]
    bench += ["--peers", "lsg triton", "lsg torch", "dense"]
    tune = [python, "-m", "bench.gpu.rehearsal", "bench.tune", "--passes", "forward", "backward", "--minutes", "0.2"]
    tune += ["--tokens", "140", "--heads", "1", "--seconds", "0"]
    return [
        Section("kernel tests", TESTS, 25, lambda _: tests, _NO_PLUGINS),
        Section("small cases: compute-sanitizer needs a GPU", SANITIZER, 25, lambda _: small),
        Section("bench", _BENCH_LOG, 25, lambda limit: [*bench, *_within(limit, 5), "--out", str(out / BENCH)]),
        Section("schedules", _TUNE_LOG, 25, lambda _: [*tune, "--out", str(out / TUNE)]),
        Section("memory", SANITIZER, 5, lambda _: small, missing="compute-sanitizer needs a GPU"),
    ]


def _within(limit: float, spare: float) -> list[str]:
    """Start nothing in the last seconds before a limit: what is cut there has no figures."""
    return ["--minutes", f"{max(limit - spare, limit / 2) / 60:.2f}"]


def find_sanitizer() -> str | None:
    """The path of NVIDIA's compute-sanitizer, on PATH or where CUDA puts it."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/local").glob("cuda*/bin")))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def _environment() -> dict[str, Any]:
    """What figures depend on: the GPU, its driver, versions, and what is installed."""
    import torch

    from bench.record import describe_run
    from lsg_attn.fused.schedules import target_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {**describe_run({}, device), "cores": len(os.sched_getaffinity(0)), "sanitizer": find_sanitizer()}
    optional = ("pytest", "hypothesis", "xdist", "transformers", "lsg_converter", "matplotlib")
    facts["installed"] = {name: find_spec(name) is not None for name in optional}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "target": target_of(torch.device("cuda")),
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # not NVIDIA's, or a driver that does not answer
        facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return facts


if __name__ == "__main__":
    raise SystemExit(main())
