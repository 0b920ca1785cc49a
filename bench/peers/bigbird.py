"""transformers' BigBird and BigBirdPegasus: a window, two global and three random blocks (arXiv 2007.14062)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import TimedCase
from bench.peers.base import (
    EncoderPeer,
    Parts,
    bart_sizes,
    bert_sizes,
    masked_attention,
    pairs_obstacle,
    total_memory,
)

BLOCK, RANDOM = 64, 3  # of google/bigbird-roberta-base and google/bigbird-pegasus-large-arxiv
_SPARSE: dict[str, Any] = {"attention_type": "block_sparse", "block_size": BLOCK, "num_random_blocks": RANDOM}


class _BigBird(EncoderPeer):
    def obstacle(self, case: TimedCase) -> str | None:
        """It needs transformers, whole blocks, and more than it sees at once, or it is full attention for good."""
        least = (5 + 2 * RANDOM) * BLOCK
        if case.tokens <= least:
            return f"with up to {least} tokens it is full attention"
        if case.tokens % BLOCK:
            return f"{case.tokens} tokens are not whole blocks of {BLOCK}"
        return super().obstacle(case) or self._memory_obstacle(case)

    def _memory_obstacle(self, case: TimedCase) -> str | None:
        """Since version 5 transformers writes every pair's probability, whether asked for or not."""
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:
            return None
        what = f"the matrix of probabilities that transformers {transformers.__version__} makes for each layer"
        return pairs_obstacle(case, case.tokens**2, 1, 0.5 * total_memory(case.device), what)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """With a mask, as a tokenizer gives it: that which BigBird makes itself is float32, whatever its weights."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def scores(self, case: TimedCase) -> int:
        """Each key that is multiplied, as often as it is."""
        return int(_times_seen(case.tokens // BLOCK).sum()) * BLOCK**2

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A softmax over its blocks. In evaluation every random block is the first: transformers draws none then."""
        times = _times_seen(case.tokens // BLOCK)
        return masked_attention(query, key, value, times.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1))


class BigBirdEncoder(_BigBird):
    """``BigBirdModel`` without its pooler."""

    name = "bigbird"

    def build(self, case: TimedCase) -> nn.Module:
        """Of BERT's kind, fresh each time."""
        from transformers import BigBirdConfig, BigBirdModel

        config = BigBirdConfig(
            **bert_sizes(case.size),
            max_position_embeddings=case.tokens,
            **_SPARSE,
            hidden_act="gelu",  # as all others; the default is one of many small steps
        )
        model: nn.Module = BigBirdModel(config, add_pooling_layer=False)
        return model

    def parts(self, model: Any) -> Parts:
        """Of its first layer."""
        attention = model.encoder.layer[0].attention
        return Parts(attention.self.query, attention.self.key, attention.self.value, attention.output.dense)


class BigBirdPegasusEncoder(_BigBird):
    """The encoder of Pegasus' kind with BigBird's attention."""

    name = "bigbird_pegasus"

    def build(self, case: TimedCase) -> nn.Module:
        """Fresh each time."""
        from transformers import BigBirdPegasusConfig
        from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import BigBirdPegasusEncoder as Encoder

        config = BigBirdPegasusConfig(
            **bart_sizes(case.size),
            max_position_embeddings=case.tokens,
            **_SPARSE,
            activation_function="gelu",  # as all others; the default is one of many small steps
        )
        model: nn.Module = Encoder(config)
        return model

    def parts(self, model: Any) -> Parts:
        """Of its first layer."""
        attention = model.layers[0].self_attn
        return Parts(attention.self.query, attention.self.key, attention.self.value, attention.output)


def _times_seen(blocks: int) -> Tensor:
    """(blocks, blocks): how often a block of queries sees one of keys, all random blocks being the first."""
    times = torch.ones(blocks, blocks, dtype=torch.int64)  # the first and the last see everything
    for row in range(1, blocks - 1):
        times[row] = 0
        times[row, [0, blocks - 1, row - 1, row, row + 1]] = 1
        times[row, 0] += RANDOM
    return times
