"""LSG-ELECTRA: ELECTRA with global tokens and LSG attention."""

from __future__ import annotations

from torch import Tensor
from transformers import (
    ElectraConfig,
    ElectraForCausalLM,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)

from .bert import BERT
from .configuration import lsg_config
from .encoder import LSGEncoderModel
from .family import Family
from .heads import lsg_head

LSGElectraConfig = lsg_config("ELECTRA", ElectraConfig, __name__)


class LSGElectraModel(LSGEncoderModel, ElectraModel):
    """:class:`transformers.ElectraModel` with global tokens and LSG attention."""

    plain_class, config_class = ElectraModel, LSGElectraConfig

    def project(self, hidden_states: Tensor) -> Tensor:
        if not hasattr(self, "embeddings_project"):
            return hidden_states
        projected: Tensor = self.embeddings_project(hidden_states)
        return projected


LSGElectraForPreTraining = lsg_head(ElectraForPreTraining, LSGElectraModel)
LSGElectraForCausalLM = lsg_head(ElectraForCausalLM, LSGElectraModel)
LSGElectraForMaskedLM = lsg_head(ElectraForMaskedLM, LSGElectraModel)
LSGElectraForSequenceClassification = lsg_head(ElectraForSequenceClassification, LSGElectraModel)
LSGElectraForMultipleChoice = lsg_head(ElectraForMultipleChoice, LSGElectraModel)
LSGElectraForTokenClassification = lsg_head(ElectraForTokenClassification, LSGElectraModel)
LSGElectraForQuestionAnswering = lsg_head(ElectraForQuestionAnswering, LSGElectraModel)

ELECTRA = Family(
    config_class=LSGElectraConfig,
    models=(
        LSGElectraModel,
        LSGElectraForPreTraining,
        LSGElectraForCausalLM,
        LSGElectraForMaskedLM,
        LSGElectraForSequenceClassification,
        LSGElectraForMultipleChoice,
        LSGElectraForTokenClassification,
        LSGElectraForQuestionAnswering,
    ),
    default=LSGElectraForPreTraining,
    tables=BERT.tables,
    adds_token_type=True,
)
