"""How much of dense attention's probability each pattern keeps, on the real encoder's own queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.quality.encoder import Encoder, cut
from bench.quality.settings import DENSE, Setting
from bench.recall import QKV, dense_layers, recall

TOKENS = 1536  # of each text
TEXTS = 2


class Dense:
    """The queries, keys and values of each layer as the encoder reads texts with dense attention."""

    def __init__(self, encoder: Encoder, documents: Sequence[Tensor]) -> None:
        long = [ids for ids in documents if ids.shape[1] >= TOKENS]
        texts = [cut(ids, TOKENS) for ids in long[:: max(len(long) // TEXTS, 1)][:TEXTS]]
        self.layers = [qkv for ids in texts for qkv in map(_without_first, dense_layers(encoder.convert(DENSE), ids))]

    @torch.inference_mode()
    def kept(self, setting: Setting) -> dict[str, Any]:
        """The shares of :class:`bench.recall.Recall`, means over texts, layers and heads."""
        found = [recall(setting.pattern, qkv) for qkv in self.layers]
        means = (sum(values) / len(values) for values in zip(*found, strict=True))
        return dict(zip(("seen", "covered", "error"), means, strict=True))


def _without_first(qkv: QKV) -> QKV:
    """Without the first token, which counts as padding; the global token stands for it."""
    query, key, value = (torch.cat([x[:, :, :1], x[:, :, 2:]], dim=2) for x in qkv)
    return query, key, value
