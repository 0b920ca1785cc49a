"""The interface of a peer's adapter: its name and look, what it can run, how, and the result it must give."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import TimedCase
from lsg_attn.cli.sizes import Size

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECK_SEED = 0  # of torch when a peer is checked: the original draws the directions of its hashes from it
# Small: embeddings are only looked up, and in a train step the time of their gradient grows with their number.
VOCABULARY = 1000


class Adapter(ABC):
    """A peer: something to measure.

    The adapters of one name, at different levels, have one label and one color.
    """

    name: str  # in records, tables and options
    label: str  # in the report
    color: str  # in pictures
    preload: tuple[str, ...] = ()  # modules to import before the processes that measure it are forked
    groups: tuple[str, ...] = ()  # see bench.cases
    is_lsg = False  # whether its result depends on the pattern

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """Why it cannot run a case, or None."""
        return None

    def checked_dtype(self, case: TimedCase) -> str:
        """The dtype in which its result is checked."""
        return case.dtype_name

    @abstractmethod
    def scores(self, case: TimedCase) -> int:
        """The number of pairs of query and key that one head computes."""

    @abstractmethod
    def expected(self, case: TimedCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result that its attention must give; all (batch, heads, length, head_dim), float64, on the CPU."""


class AttentionPeer(Adapter):
    """Attention on queries, keys and values (batch, heads, G+T, head_dim)."""

    @abstractmethod
    def prepare(self, case: TimedCase) -> Attend:
        """Make what is made once per shape, masks included, and return a function of query, key and value.

        The function's result has the shape of its inputs, or is shorter if the peer leaves out the global positions.
        """


class Parts(NamedTuple):
    """The linear layers around the attention of an encoder's first layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear


class EncoderPeer(Adapter):
    """An encoder with random weights."""

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """Why it cannot run a case, or None."""
        return missing_transformers()

    @abstractmethod
    def build(self, case: TimedCase) -> nn.Module:
        """A new model. Its result has the hidden states (batch, length, width) in ``last_hidden_state``."""

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """The model's arguments to read ids (batch, T)."""
        return {"input_ids": ids}

    @abstractmethod
    def parts(self, model: Any) -> Parts:
        """The linear layers where the attention of the first layer begins and ends."""


Peer = AttentionPeer | EncoderPeer


def bart_sizes(size: Size) -> dict[str, Any]:
    """A size as the configuration of an encoder of BART's kind."""
    return {
        "vocab_size": VOCABULARY,
        "d_model": size.width,
        "encoder_layers": size.layers,
        "encoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.feed_forward,
    }


def bert_sizes(size: Size) -> dict[str, Any]:
    """A size as the configuration of an encoder of BERT's kind."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.feed_forward,
    }


def bart_parts(attention: Any) -> Parts:
    """The linear layers of an attention of BART's kind."""
    return Parts(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)


def bert_parts(model: Any) -> Parts:
    """The linear layers of the first attention of an encoder of BERT's kind."""
    attention = model.encoder.layer[0].attention
    return Parts(attention.self.query, attention.self.key, attention.self.value, attention.output.dense)


def modeling_module(name: str) -> str:
    """The module that holds a model of transformers."""
    return f"transformers.models.{name}.modeling_{name}"


def missing_transformers() -> str | None:
    """Why models of transformers cannot run, or None."""
    return None if find_spec("transformers") else "transformers is not installed"


def masked_attention(query: Tensor, key: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """Dense attention in which a query sees each key ``count`` (queries, keys) times."""
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + count.to(query.dtype).log()
    return scores.softmax(-1) @ value


def memory_reason(case: TimedCase, pairs: int, copies: int, limit: float, what: str) -> str | None:
    """Why not to run a case that keeps ``copies`` numbers per pair of each head: more than ``limit`` bytes; or None."""
    need = pairs * copies * case.batch * case.size.heads * case.dtype.itemsize
    if need <= limit:
        return None
    return f"{what} would take {need / 2**30:.1f} GiB, more than the {limit / 2**30:.1f} that the bench gives it"


def total_memory(device: str) -> int:
    """The memory of the machine or of the GPU in bytes."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
