"""The kernel tests run on a GPU with `pytest`, and without one with `python -m ttsem.sanitize pytest`."""

from functools import partial

import pytest
import torch
from triton import knobs

from bench.gpu.rehearsal import stop_after

ON_A_GPU = torch.cuda.is_available()
IS_REAL = bool(torch.version.cuda or torch.version.hip)  # otherwise ttsem stands in for a GPU


def pytest_addoption(parser):
    parser.addoption("--last-stage", action="store_true", help="execute TTGIR; see tests/kernels/last_stage.py")


def pytest_configure(config):
    if config.getoption("--last-stage", False) and (IS_REAL or not ON_A_GPU):
        raise pytest.UsageError("--last-stage needs a build of torch for CPUs, and tests/kernels/last_stage.py")


def pytest_collection_modifyitems(items):
    if not ON_A_GPU:
        skip = pytest.mark.skip(reason="no GPU: run python -m ttsem.sanitize pytest tests/kernels")
        for item in items:
            if "tests/kernels" in item.path.as_posix():
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _stop_compiling_at_what_runs(request, monkeypatch):
    """ttsem executes one stage of Triton's compiler. The later ones take most of the time and affect no test."""
    if not ON_A_GPU or IS_REAL:
        return
    stage = "ttir"
    if request.config.getoption("--last-stage", False):
        from ttsem import harness  # which a GPU does without

        stage, prepare = "ttgir", harness.ir_for_launch
        monkeypatch.setattr(harness, "ir_for_launch", lambda record, _, target: prepare(record, stage, target))
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", partial(stop_after, stage))
