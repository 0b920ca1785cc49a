"""transformers' BigBird and BigBirdPegasus: a window, two global and three random blocks (arXiv 2007.14062)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import SEQ2SEQ, TimedCase
from bench.peers.base import (
    EncoderPeer,
    Parts,
    bart_sizes,
    bert_parts,
    bert_sizes,
    masked_attention,
    memory_reason,
    modeling_module,
    total_memory,
)

BLOCK, RANDOM = 64, 3  # of google/bigbird-roberta-base and google/bigbird-pegasus-large-arxiv


class _BigBird(EncoderPeer):
    def unsupported_reason(self, case: TimedCase) -> str | None:
        """It needs whole blocks, and enough of them: on a short input it switches to full attention for good."""
        least = (5 + 2 * RANDOM) * BLOCK
        if case.tokens <= least:
            return f"with up to {least} tokens it is full attention"
        if case.tokens % BLOCK:
            return f"{case.tokens} tokens are not whole blocks of {BLOCK}"
        return super().unsupported_reason(case) or self._memory_reason(case)

    def _memory_reason(self, case: TimedCase) -> str | None:
        """Since version 5 transformers writes the probability of every pair, even if nobody asks for it."""
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:
            return None
        what = f"the matrix of probabilities that transformers {transformers.__version__} makes for each layer"
        return memory_reason(case, case.tokens**2, 1, 0.5 * total_memory(case.device), what)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids and a mask, as a tokenizer gives them: the mask that BigBird makes itself is always float32."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def scores(self, case: TimedCase) -> int:
        """Every product counts, including those of a block that a query sees several times."""
        return int(_times_seen(case.tokens // BLOCK).sum()) * BLOCK**2

    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A softmax over its blocks. In evaluation transformers takes the first block for every random one."""
        times = _times_seen(case.tokens // BLOCK)
        return masked_attention(query, key, value, times.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1))


def _options(case: TimedCase) -> dict[str, Any]:
    """The options that both models' configurations share."""
    return {
        "max_position_embeddings": case.tokens,
        "attention_type": "block_sparse",
        "block_size": BLOCK,
        "num_random_blocks": RANDOM,
    }


class BigBirdEncoder(_BigBird):
    """``BigBirdModel`` without its pooler."""

    name, label, color = "bigbird", "BigBird", "#ff7f0e"
    preload = (modeling_module("big_bird"),)

    def build(self, case: TimedCase) -> nn.Module:
        """An encoder of BERT's kind, with the activation of the other peers: the default takes many small steps."""
        from transformers import BigBirdConfig, BigBirdModel

        config = BigBirdConfig(**bert_sizes(case.size), **_options(case), hidden_act="gelu")
        model: nn.Module = BigBirdModel(config, add_pooling_layer=False)
        return model

    def parts(self, model: Any) -> Parts:
        """The parts have BERT's names."""
        return bert_parts(model)


class BigBirdPegasusEncoder(_BigBird):
    """The encoder of Pegasus' kind with BigBird's attention."""

    name, label, color = "bigbird_pegasus", "BigBirdPegasus", "#bcbd22"
    preload = (modeling_module("bigbird_pegasus"),)
    groups = (SEQ2SEQ,)

    def build(self, case: TimedCase) -> nn.Module:
        """The encoder alone, with the activation of the other peers: the default takes many small steps."""
        from transformers import BigBirdPegasusConfig
        from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import BigBirdPegasusEncoder as Encoder

        config = BigBirdPegasusConfig(**bart_sizes(case.size), **_options(case), activation_function="gelu")
        model: nn.Module = Encoder(config)
        return model

    def parts(self, model: Any) -> Parts:
        """Its query, key and value layers are in a module of their own."""
        attention = model.layers[0].self_attn
        return Parts(attention.self.query, attention.self.key, attention.self.value, attention.output)


def _times_seen(blocks: int) -> Tensor:
    """How often each block of queries sees each block of keys, all random blocks being the first: (blocks, blocks)."""
    times = torch.ones(blocks, blocks, dtype=torch.int64)  # the first and the last block see everything
    for row in range(1, blocks - 1):
        times[row] = 0
        times[row, [0, blocks - 1, row - 1, row, row + 1]] = 1
        times[row, 0] += RANDOM
    return times
