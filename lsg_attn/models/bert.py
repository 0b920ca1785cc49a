"""LSG-BERT: BERT with global tokens and LSG attention."""

from __future__ import annotations

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

from .configuration import lsg_config
from .encoder import LSGEncoderModel
from .family import Family, Tables
from .heads import lsg_head

LSGBertConfig = lsg_config("BERT", BertConfig, __name__)


class LSGBertModel(LSGEncoderModel, BertModel):
    """:class:`transformers.BertModel` with global tokens and LSG attention."""

    plain_class, config_class = BertModel, LSGBertConfig


LSGBertForPreTraining = lsg_head(BertForPreTraining, LSGBertModel)
LSGBertLMHeadModel = lsg_head(BertLMHeadModel, LSGBertModel)
LSGBertForMaskedLM = lsg_head(BertForMaskedLM, LSGBertModel)
LSGBertForNextSentencePrediction = lsg_head(BertForNextSentencePrediction, LSGBertModel)
LSGBertForSequenceClassification = lsg_head(BertForSequenceClassification, LSGBertModel)
LSGBertForMultipleChoice = lsg_head(BertForMultipleChoice, LSGBertModel)
LSGBertForTokenClassification = lsg_head(BertForTokenClassification, LSGBertModel)
LSGBertForQuestionAnswering = lsg_head(BertForQuestionAnswering, LSGBertModel)

BERT = Family(
    config_class=LSGBertConfig,
    models=(
        LSGBertModel,
        LSGBertForPreTraining,
        LSGBertLMHeadModel,
        LSGBertForMaskedLM,
        LSGBertForNextSentencePrediction,
        LSGBertForSequenceClassification,
        LSGBertForMultipleChoice,
        LSGBertForTokenClassification,
        LSGBertForQuestionAnswering,
    ),
    default=LSGBertForPreTraining,
    tables=Tables(
        "embeddings.word_embeddings.weight",
        "embeddings.global_embeddings.weight",
        ("embeddings.position_embeddings.weight",),
        "embeddings.token_type_embeddings.weight",
    ),
    adds_token_type=True,
)
