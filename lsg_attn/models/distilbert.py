"""LSG-DistilBERT: DistilBERT with global tokens and LSG attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

from .bert import BERT
from .configuration import lsg_config
from .encoder import LSGEncoderModel, LSGSelfAttention
from .family import Family
from .heads import lsg_head

LSGDistilBertConfig = lsg_config("DistilBERT", DistilBertConfig, __name__)


class LSGDistilBertSelfAttention(LSGSelfAttention):
    """DistilBERT's self-attention, which holds its output projection, with an LSG pattern."""

    out_lin: nn.Module

    def forward(  # type: ignore[override]
        self,
        *states: Tensor,
        attention_mask: Tensor | None = None,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As a layer calls it: before transformers 5 with the same states as query, key and value, and a mask."""
        hidden_states, mask = (states[0], attention_mask) if query is None else (query, mask)
        return self.out_lin(self.attend(hidden_states, mask)), None


class LSGDistilBertModel(LSGEncoderModel, DistilBertModel):
    """:class:`transformers.DistilBertModel` with global tokens and LSG attention."""

    plain_class, config_class = DistilBertModel, LSGDistilBertConfig
    attention_class = LSGDistilBertSelfAttention
    attention_path, attention_names = "attention", ("q_lin", "k_lin", "v_lin", "out_lin")
    dropout_key = "attention_dropout"

    def ordered_layers(self) -> list[nn.Module]:
        return list(self.transformer.layer)


LSGDistilBertForMaskedLM = lsg_head(DistilBertForMaskedLM, LSGDistilBertModel)
LSGDistilBertForSequenceClassification = lsg_head(DistilBertForSequenceClassification, LSGDistilBertModel)
LSGDistilBertForMultipleChoice = lsg_head(DistilBertForMultipleChoice, LSGDistilBertModel)
LSGDistilBertForTokenClassification = lsg_head(DistilBertForTokenClassification, LSGDistilBertModel)
LSGDistilBertForQuestionAnswering = lsg_head(DistilBertForQuestionAnswering, LSGDistilBertModel)

DISTILBERT = Family(
    config_class=LSGDistilBertConfig,
    models=(
        LSGDistilBertModel,
        LSGDistilBertForMaskedLM,
        LSGDistilBertForSequenceClassification,
        LSGDistilBertForMultipleChoice,
        LSGDistilBertForTokenClassification,
        LSGDistilBertForQuestionAnswering,
    ),
    default=LSGDistilBertForMaskedLM,
    tables=replace(BERT.tables, token_types=None),
)
