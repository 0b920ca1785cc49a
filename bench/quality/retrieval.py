"""How a setting reads: cosines to the plain model, and the ranks of the documents that are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

from bench.quality.corpus import LONGEST_QUESTION, Document
from bench.quality.encoder import Encoder, cut
from bench.quality.settings import Setting
from lsg_attn.cli.embedding import PIECE, mean_state

SHORT = (128, PIECE)  # tokens of the texts whose cosine to the plain model is taken
FIRST_PIECE, PIECES = "plain model, first 512 tokens", "plain model, mean of pieces"
BASELINES = (FIRST_PIECE, PIECES)
_SHORT_TEXTS = 12
Embed = Callable[[Tensor], Tensor]


class Reading:
    """The documents and questions as ids, and what the plain model makes of them."""

    def __init__(self, encoder: Encoder, documents: Sequence[Document]) -> None:
        self.encoder = encoder
        self.documents = [encoder.ids(document.text) for document in documents]
        self.titles = [encoder.ids(document.title) for document in documents]
        self.late = [encoder.ids(sentence) for document in documents for sentence in document.late]
        self.about = [index for index, document in enumerate(documents) for _ in document.late]
        short = [self.documents[index] for index in short_texts(len(documents))]
        self.short = {length: [cut(ids, length) for ids in short] for length in SHORT}
        with torch.inference_mode():
            self.plain_titles, self.plain_late = (_table(encoder.embed, ids) for ids in (self.titles, self.late))
            self.plain_short = {length: _table(encoder.embed, ids) for length, ids in self.short.items()}
            self.pieces = _table(encoder.mean_of_pieces, self.documents)

    @torch.inference_mode()
    def baseline(self, name: str) -> dict[str, Any]:
        """The figures of one of ``BASELINES``."""
        table = self.pieces if name == PIECES else _table(self.encoder.first_piece, self.documents)
        return {"cosine": _cosines(table, self.pieces), **self._ranks(table, self.plain_titles, self.plain_late)}

    @torch.inference_mode()
    def setting(self, setting: Setting) -> dict[str, Any]:
        """The figures of a conversion."""
        return self._figures(self.encoder.convert(setting), setting)

    @torch.inference_mode()
    def trained(self, folder: Path) -> dict[str, Any]:
        """The row of a model that ``examples/tune_globals.py`` trained to give what the plain model gives.

        The plain model reads its questions.

        Raises:
            FileNotFoundError: the folder has no record of the training.
        """
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        model = AutoModel.from_pretrained(folder).eval()
        sizes = {key: getattr(model.config, key) for key in Setting("norm", 128).keys if key != "sparse_block_size"}
        setting = Setting(**sizes, plain_questions=True)
        return {"label": f"{setting.label}, trained", "training": training, **self._figures(model, setting)}

    def _figures(self, model: Any, setting: Setting) -> dict[str, Any]:
        def embed(ids: Tensor) -> Tensor:
            return mean_state(model, ids)

        titles, late = self.plain_titles, self.plain_late
        if not setting.plain_questions and not setting.is_plain(LONGEST_QUESTION):
            titles, late = _table(embed, self.titles), _table(embed, self.late)
        short = {f"cosine_{n}": _cosines(_table(embed, self.short[n]), self.plain_short[n]) for n in SHORT}
        table = _table(embed, self.documents)
        return {**short, "cosine": _cosines(table, self.pieces), **self._ranks(table, titles, late)}

    def _ranks(self, table: Tensor, titles: Tensor, late: Tensor) -> dict[str, list[int]]:
        return {
            "title": ranks(table, titles, list(range(len(self.titles)))),
            "late": ranks(table, late, self.about),
        }


def short_texts(documents: int) -> range:
    """The documents whose beginnings are the texts of ``SHORT`` tokens: about ``_SHORT_TEXTS``, evenly out of all."""
    return range(0, documents, max(documents // _SHORT_TEXTS, 1))


def ranks(documents: Tensor, questions: Tensor, about: Sequence[int]) -> list[int]:
    """For each question, how many documents score higher than the one that it is about.

    ``documents``, ``questions``: normalised embeddings (number, width); a score is their product.
    """
    scores = questions @ documents.mT
    return (scores > scores[torch.arange(len(about)), about].unsqueeze(1)).sum(1).tolist()


def _table(embed: Embed, texts: Sequence[Tensor]) -> Tensor:
    """The normalised embeddings (texts, width)."""
    return torch.stack([normalize(embed(ids), dim=0) for ids in texts])


def _cosines(left: Tensor, right: Tensor) -> list[float]:
    return [round(x, 5) for x in (left * right).sum(1).tolist()]
