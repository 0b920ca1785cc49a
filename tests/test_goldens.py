"""Recordings of the original, lsg-converter 0.1.9: out and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import IMPLEMENTATIONS

from lsg_attn import LSGPattern
from lsg_attn.testing import Inputs, assert_close, run_attention

RECORDINGS = sorted((Path(__file__).parent / "goldens/attention").glob("*.npz"))
PARAMETERS = (
    "sparsity_type",
    "block_size",
    "sparse_block_size",
    "sparsity_factor",
    "num_global_tokens",
    "lsh_num_pre_rounds",
)


def test_recordings_are_here():
    assert len(RECORDINGS) == 26


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recording(path, implementation):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    pattern = LSGPattern(**{name: arrays[name].item() for name in PARAMETERS})
    inputs = Inputs(*(torch.from_numpy(arrays[name]) for name in ("q", "k", "v", "dout", "attention_mask")))
    rounds = [torch.from_numpy(arrays[f"proj_{i}"])[0, :, 0] for i in range(len(pattern.lsh_buckets))]
    got = run_attention(inputs, pattern, implementation=implementation, lsh_projections=rounds or None)
    for name, recorded in zip(("out", "dquery", "dkey", "dvalue"), ("out", "dq", "dk", "dv"), strict=True):
        assert_close(name, got[name], torch.from_numpy(arrays[recorded]))
