"""Recordings of the original, lsg-converter 0.1.9, in tests/goldens/attention."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lsg_attn import LSGPattern
from lsg_attn.testing import Inputs

PATHS = sorted((Path(__file__).parent / "goldens/attention").glob("*.npz"))
_PARAMETERS = (
    "sparsity_type",
    "block_size",
    "sparse_block_size",
    "sparsity_factor",
    "num_global_tokens",
    "lsh_num_pre_rounds",
)


class Recording(NamedTuple):
    """Inputs, the directions of each lsh round (heads, head_dim, m//2), and results by name."""

    pattern: LSGPattern
    inputs: Inputs
    directions: list[torch.Tensor]
    results: dict[str, torch.Tensor]


def load(path):
    """The recording in a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    pattern = LSGPattern(**{name: arrays[name].item() for name in _PARAMETERS})
    inputs = Inputs(*(torch.from_numpy(arrays[name]) for name in ("q", "k", "v", "dout", "attention_mask")))
    rounds = range(len(pattern.lsh_buckets))
    directions = [torch.from_numpy(arrays[f"proj_{i}"])[0, :, 0].contiguous() for i in rounds]
    names = {"out": "out", "dquery": "dq", "dkey": "dk", "dvalue": "dv"}
    return Recording(pattern, inputs, directions, {name: torch.from_numpy(arrays[x]) for name, x in names.items()})
