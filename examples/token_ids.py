"""The token ids of one long text, for the examples that share out documents over processes."""

from __future__ import annotations

import re
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PIECE = 65536  # characters


def read_text(path: Path | None, num_bytes: int) -> str:
    """A text file in UTF-8; without one, the topics of Python's help, again and again, up to ``num_bytes``.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)) + "\n\n"
    return bytes(islice(cycle(text.encode()), num_bytes)).decode(errors="ignore")


def ids_of(text: str, tokenizer: Any) -> Tensor:
    """The ids (tokens,) of a text, without special ones.

    A tokenizer takes some hundred bytes for each token until it returns. So it is given pieces, cut before white space.
    """
    pieces = re.finditer(rf".{{1,{_PIECE}}}(?=\s|\Z)|.{{1,{_PIECE}}}", text, re.DOTALL)
    found = (tokenizer(x[0], add_special_tokens=False, verbose=False)["input_ids"] for x in pieces)
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.tensor(x, dtype=torch.int64) for x in found)])


def between_special_ids(ids: Tensor, tokenizer: Any) -> Tensor:
    """Ids (tokens + 2,): one document, between the tokenizer's CLS and SEP."""
    return torch.cat([torch.tensor([tokenizer.cls_token_id]), ids, torch.tensor([tokenizer.sep_token_id])])
