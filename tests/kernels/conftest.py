"""The kernel tests need a GPU: a real one with `pytest`, or none with `python -m ttsem.sanitize pytest`."""

import pytest
import torch

ON_A_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    if not ON_A_GPU:
        skip = pytest.mark.skip(reason="no GPU: run python -m ttsem.sanitize pytest tests/kernels")
        for item in items:
            if "tests/kernels" in item.path.as_posix():
                item.add_marker(skip)
