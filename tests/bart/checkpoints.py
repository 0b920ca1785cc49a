"""The tiny checkpoints in tests/goldens/bart: what lsg-converter 0.1.9 published, and what it computed."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lsg_attn.bart import LSGBartForConditionalGeneration

_NAMES = ("seq2seq_norm", "seq2seq_stride_no_pass", "seq2seq_pooling_mask_first")
_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json")
# What each checkpoint shares with another one. The repository stores a shared file once.
_SHARED = {
    "converted": ["base/generation_config.json", *(f"base/{name}" for name in _TOKENIZER)],
    **{name: ["base/generation_config.json", "converted/model.safetensors"] for name in _NAMES},
}


def _assemble():
    """A temporary folder of whole checkpoints, which is removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="lsg-attn-checkpoints-"))
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(Path(__file__).parent.parent / "goldens/bart", folder, dirs_exist_ok=True)
    for name, files in _SHARED.items():
        for file in files:
            shutil.copy(folder / file, folder / name)
    return folder


FOLDER = _assemble()
BASE, CONVERTED = FOLDER / "base", FOLDER / "converted"
SEQ2SEQ = [FOLDER / name for name in _NAMES]
CLASSIFY = FOLDER / "classify_bos_pooling"
NORM = SEQ2SEQ[0]
GENERATE = {"max_new_tokens": 16, "min_new_tokens": 8, "do_sample": False}

# The configuration of random models, for what was not recorded.
TINY = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "block_size": 16,
    "sparse_block_size": 16,
}


class Recorded(NamedTuple):
    """The original's inputs by argument name, and its results."""

    inputs: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]


def recorded(folder):
    """The recording beside a checkpoint."""
    with np.load(folder / "io.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    inputs = {name: arrays.pop(name) for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in arrays}
    return Recorded(inputs, arrays)


def encoder_mask(model, attention_mask):
    """Which of the encoder's states are not padding, (batch, G+T) bool."""
    num_globals = model.config.num_global_tokens if model.config.pass_global_tokens_to_decoder else 0
    return torch.nn.functional.pad(attention_mask, (num_globals, 0), value=1).bool()


def seq2seq(folder=NORM, **overrides):
    """A checkpoint with its language-modeling head, in evaluation mode."""
    return LSGBartForConditionalGeneration.from_pretrained(folder, **overrides).eval()
