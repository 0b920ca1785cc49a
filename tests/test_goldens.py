"""Recordings of the original, lsg-converter 0.1.9: out and gradients."""

import pytest
import recordings
from strategies import IMPLEMENTATIONS

from lsg_attn.testing import assert_close, run_attention


def test_recordings_are_here():
    assert len(recordings.PATHS) == 26


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", recordings.PATHS, ids=lambda path: path.stem)
def test_recording(path, implementation):
    pattern, inputs, directions, results = recordings.load(path)
    got = run_attention(inputs, pattern, implementation=implementation, lsh_projections=directions or None)
    for name, recorded in results.items():
        assert_close(name, got[name], recorded)
