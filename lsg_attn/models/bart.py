"""LSG-BART: BART with an LSG encoder."""

from __future__ import annotations

from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
)
from transformers.models.bart.modeling_bart import (
    BartDecoder,
    BartEncoder,
    BartEncoderLayer,
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)

from .configuration import LSGSeq2SeqConfig, lsg_config
from .family import Family, Tables
from .heads import lsg_decoder, lsg_head
from .seq2seq import LSGEncoderLayer, LSGSeq2SeqEncoder, LSGSeq2SeqModel

LSGBartConfig = lsg_config("BART", BartConfig, __name__, LSGSeq2SeqConfig)


class LSGBartEncoderLayer(LSGEncoderLayer, BartEncoderLayer):
    """BART's encoder layer with LSG attention."""


class LSGBartEncoder(LSGSeq2SeqEncoder, BartEncoder):
    """BART's encoder with global embeddings before the tokens and LSG attention in every layer."""

    plain_class, config_class, layer_class = BartEncoder, LSGBartConfig, LSGBartEncoderLayer
    word_class, position_class = BartScaledWordEmbedding, BartLearnedPositionalEmbedding
    _no_split_modules = ["LSGBartEncoderLayer", "BartDecoderLayer"]  # noqa: RUF012  # transformers needs a list


class LSGBartModel(LSGSeq2SeqModel, BartModel):
    """BART with an LSG encoder. It has the arguments and results of :class:`transformers.BartModel`."""

    plain_class, config_class = BartModel, LSGBartConfig
    encoder_class, decoder_class = LSGBartEncoder, BartDecoder
    _no_split_modules = LSGBartEncoder._no_split_modules


LSGBartForConditionalGeneration = lsg_head(BartForConditionalGeneration, LSGBartModel)
LSGBartForSequenceClassification = lsg_head(BartForSequenceClassification, LSGBartModel)
LSGBartForQuestionAnswering = lsg_head(BartForQuestionAnswering, LSGBartModel)
LSGBartForCausalLM = lsg_decoder(BartForCausalLM, LSGBartModel)

BART = Family(
    config_class=LSGBartConfig,
    models=(
        LSGBartModel,
        LSGBartForConditionalGeneration,
        LSGBartForSequenceClassification,
        LSGBartForQuestionAnswering,
        LSGBartForCausalLM,
    ),
    default=LSGBartForConditionalGeneration,
    tables=Tables(
        "shared.weight",
        "encoder.global_embeddings.weight",
        ("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
    ),
    position_offset=2,
)
