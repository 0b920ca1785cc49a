"""LSG-RoBERTa, and LSG-XLM-RoBERTa and LSG-CamemBERT, which are the same function under other names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CamembertConfig,
    CamembertForCausalLM,
    CamembertForMaskedLM,
    CamembertForMultipleChoice,
    CamembertForQuestionAnswering,
    CamembertForSequenceClassification,
    CamembertForTokenClassification,
    CamembertModel,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

from .bert import BERT
from .configuration import lsg_config
from .encoder import LSGEncoderModel
from .family import Family
from .heads import LSGHead, lsg_head

LSGRobertaConfig = lsg_config("RoBERTa", RobertaConfig, __name__)
LSGXLMRobertaConfig = lsg_config("XLM-RoBERTa", XLMRobertaConfig, __name__)
LSGCamembertConfig = lsg_config("CamemBERT", CamembertConfig, __name__)


class RobertaModelWithPositions(LSGEncoderModel):
    """A model whose positions count the tokens that are not padding, after ``pad_token_id + 1`` rows without one."""

    def position_ids(self, input_ids: Tensor | None, tokens: Tensor) -> Tensor:
        """The tokens' rows (batch or 1, T) of the position table; all count where there are no ids."""
        padding: int = self.config.pad_token_id
        if input_ids is None:
            return super().position_ids(None, tokens) + padding + 1
        is_token = (input_ids != padding).long()
        return torch.cumsum(is_token, dim=1) * is_token + padding

    def position_offset(self) -> int:
        """The number of rows of the position table before position 0."""
        offset: int = self.config.pad_token_id + 1
        return offset


class RobertaCausalHead(LSGHead):
    """A head that generates."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, without ``position_ids``: they would count from 0, not from the model's first."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


class LSGRobertaModel(RobertaModelWithPositions, RobertaModel):
    """:class:`transformers.RobertaModel` with global tokens and LSG attention."""

    plain_class, config_class = RobertaModel, LSGRobertaConfig


class LSGXLMRobertaModel(RobertaModelWithPositions, XLMRobertaModel):
    """:class:`transformers.XLMRobertaModel` with global tokens and LSG attention."""

    plain_class, config_class = XLMRobertaModel, LSGXLMRobertaConfig


class LSGCamembertModel(RobertaModelWithPositions, CamembertModel):
    """:class:`transformers.CamembertModel` with global tokens and LSG attention."""

    plain_class, config_class = CamembertModel, LSGCamembertConfig


LSGRobertaForCausalLM = lsg_head(RobertaForCausalLM, LSGRobertaModel, RobertaCausalHead)
LSGRobertaForMaskedLM = lsg_head(RobertaForMaskedLM, LSGRobertaModel)
LSGRobertaForSequenceClassification = lsg_head(RobertaForSequenceClassification, LSGRobertaModel)
LSGRobertaForMultipleChoice = lsg_head(RobertaForMultipleChoice, LSGRobertaModel)
LSGRobertaForTokenClassification = lsg_head(RobertaForTokenClassification, LSGRobertaModel)
LSGRobertaForQuestionAnswering = lsg_head(RobertaForQuestionAnswering, LSGRobertaModel)

LSGXLMRobertaForCausalLM = lsg_head(XLMRobertaForCausalLM, LSGXLMRobertaModel, RobertaCausalHead)
LSGXLMRobertaForMaskedLM = lsg_head(XLMRobertaForMaskedLM, LSGXLMRobertaModel)
LSGXLMRobertaForSequenceClassification = lsg_head(XLMRobertaForSequenceClassification, LSGXLMRobertaModel)
LSGXLMRobertaForMultipleChoice = lsg_head(XLMRobertaForMultipleChoice, LSGXLMRobertaModel)
LSGXLMRobertaForTokenClassification = lsg_head(XLMRobertaForTokenClassification, LSGXLMRobertaModel)
LSGXLMRobertaForQuestionAnswering = lsg_head(XLMRobertaForQuestionAnswering, LSGXLMRobertaModel)

LSGCamembertForCausalLM = lsg_head(CamembertForCausalLM, LSGCamembertModel, RobertaCausalHead)
LSGCamembertForMaskedLM = lsg_head(CamembertForMaskedLM, LSGCamembertModel)
LSGCamembertForSequenceClassification = lsg_head(CamembertForSequenceClassification, LSGCamembertModel)
LSGCamembertForMultipleChoice = lsg_head(CamembertForMultipleChoice, LSGCamembertModel)
LSGCamembertForTokenClassification = lsg_head(CamembertForTokenClassification, LSGCamembertModel)
LSGCamembertForQuestionAnswering = lsg_head(CamembertForQuestionAnswering, LSGCamembertModel)


def _family(*models: type[Any]) -> Family:
    base, _, masked_lm, *_ = models
    return Family(
        config_class=base.config_class,
        models=models,
        default=masked_lm,
        tables=BERT.tables,
        counts_padding=True,
    )


ROBERTA = _family(
    LSGRobertaModel,
    LSGRobertaForCausalLM,
    LSGRobertaForMaskedLM,
    LSGRobertaForSequenceClassification,
    LSGRobertaForMultipleChoice,
    LSGRobertaForTokenClassification,
    LSGRobertaForQuestionAnswering,
)
XLM_ROBERTA = _family(
    LSGXLMRobertaModel,
    LSGXLMRobertaForCausalLM,
    LSGXLMRobertaForMaskedLM,
    LSGXLMRobertaForSequenceClassification,
    LSGXLMRobertaForMultipleChoice,
    LSGXLMRobertaForTokenClassification,
    LSGXLMRobertaForQuestionAnswering,
)
CAMEMBERT = _family(
    LSGCamembertModel,
    LSGCamembertForCausalLM,
    LSGCamembertForMaskedLM,
    LSGCamembertForSequenceClassification,
    LSGCamembertForMultipleChoice,
    LSGCamembertForTokenClassification,
    LSGCamembertForQuestionAnswering,
)
