"""Recordings of the original, lsg-converter 0.1.9: out and gradients."""

from hashlib import sha256
from pathlib import Path

import pytest
import recordings
from strategies import IMPLEMENTATIONS

from lsg_attn.testing import assert_close, run_attention


def test_all_recordings_are_found():
    assert len(recordings.PATHS) == 26


def test_no_golden_is_a_copy_of_another():
    paths = [path for path in (Path(__file__).parent / "goldens").rglob("*") if path.is_file()]
    by_content = {}
    for path in paths:
        by_content.setdefault(sha256(path.read_bytes()).digest(), []).append(path)
    assert len(paths) > len(recordings.PATHS)
    assert [copies for copies in by_content.values() if len(copies) > 1] == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", recordings.PATHS, ids=lambda path: path.stem)
def test_equals_the_recording(path, implementation):
    pattern, inputs, directions, results = recordings.load(path)
    got = run_attention(inputs, pattern, implementation=implementation, lsh_projections=directions or None)
    for name, recorded in results.items():
        assert_close(name, got[name], recorded)
