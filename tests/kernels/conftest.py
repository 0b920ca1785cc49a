"""The kernel tests run on a GPU with `pytest`, and without one with `python -m ttsem.sanitize pytest`."""

import pytest
import torch
from triton import knobs

ON_A_GPU = torch.cuda.is_available()
IS_REAL = bool(torch.version.cuda or torch.version.hip)  # otherwise ttsem stands in for a GPU


def pytest_collection_modifyitems(items):
    if not ON_A_GPU:
        skip = pytest.mark.skip(reason="no GPU: run python -m ttsem.sanitize pytest tests/kernels")
        for item in items:
            if "tests/kernels" in item.path.as_posix():
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _stop_compiling_at_what_runs(monkeypatch):
    """ttsem executes Triton IR, the first stage. The other stages take most of the time and affect no test."""
    if ON_A_GPU and not IS_REAL:
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", _first_stage_only)


def _first_stage_only(*arguments):
    """Triton's hook. Without arguments it returns a cache key, else it may change the stages."""
    if not arguments:
        return "ttir only", "ttir only"
    _, stages, *_ = arguments
    for name in ("ttgir", "llir", "ptx"):
        del stages[name]
    stages["cubin"] = _no_binary
    return None


def _no_binary(module, metadata):
    metadata.update(name="not compiled", shared=0)
    return b""
