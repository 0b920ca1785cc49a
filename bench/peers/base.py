"""What an adapter says: whether its peer can run a case, how, and what it must give."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import Size, TimedCase

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECK_SEED = 0  # torch's seed when a peer is checked: the original draws its hashes' directions from there
# Few, as embeddings are looked up, and in a train step their gradient would count for nothing but their number.
VOCABULARY = 1000


class Adapter(ABC):
    """Something that is measured. ``is_lsg``: whether what it computes depends on the pattern."""

    name: str
    is_lsg = False

    def obstacle(self, case: TimedCase) -> str | None:
        """Why it can not run a case, or None."""
        return None

    def checked_dtype(self, case: TimedCase) -> str:
        """The dtype in which it has to give what it must give."""
        return case.dtype_name

    @abstractmethod
    def scores(self, case: TimedCase) -> int:
        """Pairs of query and key that one head computes."""

    @abstractmethod
    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What its attention must give on float64 (batch, heads, length, head_dim) on the CPU: shaped so, float64."""


class AttentionPeer(Adapter):
    """Attention on queries, keys and values (batch, heads, G+T, head_dim)."""

    @abstractmethod
    def prepare(self, case: TimedCase) -> Attend:
        """Make what is made once for a shape, masks included; the result takes and gives the shape above.

        The output's length may be less, where there is no global position.
        """


class Parts(NamedTuple):
    """The linear layers around the attention of an encoder's first layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear


class EncoderPeer(Adapter):
    """An encoder with random weights."""

    def obstacle(self, case: TimedCase) -> str | None:
        """Why it can not run a case, or None."""
        return missing_transformers()

    @abstractmethod
    def build(self, case: TimedCase) -> nn.Module:
        """The model, whose result on its inputs has the states in ``last_hidden_state``."""

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with to read ids (batch, T)."""
        return {"input_ids": ids}

    @abstractmethod
    def parts(self, model: Any) -> Parts:
        """Where its first layer's attention begins and ends."""


Peer = AttentionPeer | EncoderPeer


def bart_sizes(size: Size) -> dict[str, Any]:
    """The configuration of an encoder of BART's kind."""
    return {
        "vocab_size": VOCABULARY,
        "d_model": size.width,
        "encoder_layers": size.layers,
        "encoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.feed_forward,
    }


def bert_sizes(size: Size) -> dict[str, Any]:
    """The configuration of an encoder of BERT's kind."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.feed_forward,
    }


def bart_parts(attention: Any) -> Parts:
    """The linear layers of an attention with BART's names."""
    return Parts(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)


def missing_transformers() -> str | None:
    """Why no model of transformers can run, or None."""
    return None if find_spec("transformers") else "transformers is not installed"


def masked_attention(query: Tensor, key: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """Dense attention in which a query sees each key as often as ``count`` (queries, keys) says."""
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + count.to(query.dtype).log()
    return scores.softmax(-1) @ value


def pairs_obstacle(case: TimedCase, pairs: int, copies: int, limit: float, what: str) -> str | None:
    """Why not to run what keeps ``copies`` numbers of each of so many pairs of a head: more than ``limit`` bytes."""
    need = pairs * copies * case.batch * case.size.heads * case.dtype.itemsize
    if need <= limit:
        return None
    return f"{what} would take {need / 2**30:.1f} GiB, more than the {limit / 2**30:.1f} that the bench gives it"


def total_memory(device: str) -> int:
    """Bytes of the machine, or of the GPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
