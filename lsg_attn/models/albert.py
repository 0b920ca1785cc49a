"""LSG-ALBERT: ALBERT with global tokens and LSG attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)

from .bert import BERT
from .configuration import lsg_config
from .encoder import LSGEncoderModel, LSGSelfAttention
from .family import Family
from .heads import lsg_head

LSGAlbertConfig = lsg_config("ALBERT", AlbertConfig, __name__)


class LSGAlbertSelfAttention(LSGSelfAttention):
    """ALBERT's self-attention, which holds its output projection and norm, with an LSG pattern."""

    dense: nn.Module
    LayerNorm: nn.Module
    output_dropout: nn.Module

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        out = self.output_dropout(self.dense(self.attend(hidden_states, attention_mask)))
        return self.LayerNorm(hidden_states + out), None


class LSGAlbertModel(LSGEncoderModel, AlbertModel):
    """:class:`transformers.AlbertModel` with global tokens and LSG attention."""

    plain_class, config_class = AlbertModel, LSGAlbertConfig
    attention_class = LSGAlbertSelfAttention
    attention_path, attention_names = "attention", ("query", "key", "value", "dense", "LayerNorm", "output_dropout")
    supports_gradient_checkpointing = True

    def ordered_layers(self) -> list[nn.Module]:
        """The layers in the order of their use; a group's layers are used several times."""
        groups, count = self.encoder.albert_layer_groups, self.config.num_hidden_layers
        used = (groups[i * len(groups) // count] for i in range(count))
        return [layer for group in used for layer in group.albert_layers]

    def project(self, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.encoder.embedding_hidden_mapping_in(hidden_states)
        return projected

    def pool(self, hidden_states: Tensor) -> Tensor | None:
        return None if self.pooler is None else self.pooler_activation(self.pooler(hidden_states[:, 0]))


LSGAlbertForPreTraining = lsg_head(AlbertForPreTraining, LSGAlbertModel)
LSGAlbertForMaskedLM = lsg_head(AlbertForMaskedLM, LSGAlbertModel)
LSGAlbertForSequenceClassification = lsg_head(AlbertForSequenceClassification, LSGAlbertModel)
LSGAlbertForMultipleChoice = lsg_head(AlbertForMultipleChoice, LSGAlbertModel)
LSGAlbertForTokenClassification = lsg_head(AlbertForTokenClassification, LSGAlbertModel)
LSGAlbertForQuestionAnswering = lsg_head(AlbertForQuestionAnswering, LSGAlbertModel)

ALBERT = Family(
    config_class=LSGAlbertConfig,
    models=(
        LSGAlbertModel,
        LSGAlbertForPreTraining,
        LSGAlbertForMaskedLM,
        LSGAlbertForSequenceClassification,
        LSGAlbertForMultipleChoice,
        LSGAlbertForTokenClassification,
        LSGAlbertForQuestionAnswering,
    ),
    default=LSGAlbertForPreTraining,
    tables=BERT.tables,
    adds_token_type=True,
)
