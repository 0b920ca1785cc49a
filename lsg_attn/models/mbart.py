"""LSG-mBART: mBART with an LSG encoder. BARThez checkpoints are mBARTs, too."""

from __future__ import annotations

from transformers import (
    MBartConfig,
    MBartForCausalLM,
    MBartForConditionalGeneration,
    MBartForQuestionAnswering,
    MBartForSequenceClassification,
    MBartModel,
)
from transformers.models.mbart.modeling_mbart import (
    MBartDecoder,
    MBartEncoder,
    MBartEncoderLayer,
    MBartLearnedPositionalEmbedding,
    MBartScaledWordEmbedding,
)

from .bart import BART
from .configuration import LSGSeq2SeqConfig, lsg_config
from .family import Family
from .heads import lsg_decoder, lsg_head
from .seq2seq import LSGEncoderLayer, LSGSeq2SeqEncoder, LSGSeq2SeqModel

LSGMBartConfig = lsg_config("mBART", MBartConfig, __name__, LSGSeq2SeqConfig)


class LSGMBartEncoderLayer(LSGEncoderLayer, MBartEncoderLayer):
    """mBART's encoder layer with LSG attention."""

    norms_first = True


class LSGMBartEncoder(LSGSeq2SeqEncoder, MBartEncoder):
    """mBART's encoder with global embeddings before the tokens and LSG attention in every layer."""

    plain_class, config_class, layer_class = MBartEncoder, LSGMBartConfig, LSGMBartEncoderLayer
    word_class, position_class = MBartScaledWordEmbedding, MBartLearnedPositionalEmbedding
    _no_split_modules = ["LSGMBartEncoderLayer", "MBartDecoderLayer"]  # noqa: RUF012  # transformers needs a list


class LSGMBartModel(LSGSeq2SeqModel, MBartModel):
    """mBART with an LSG encoder. It has the arguments and results of :class:`transformers.MBartModel`."""

    plain_class, config_class = MBartModel, LSGMBartConfig
    encoder_class, decoder_class = LSGMBartEncoder, MBartDecoder
    _no_split_modules = LSGMBartEncoder._no_split_modules


LSGMBartForConditionalGeneration = lsg_head(MBartForConditionalGeneration, LSGMBartModel)
LSGMBartForSequenceClassification = lsg_head(MBartForSequenceClassification, LSGMBartModel)
LSGMBartForQuestionAnswering = lsg_head(MBartForQuestionAnswering, LSGMBartModel)
LSGMBartForCausalLM = lsg_decoder(MBartForCausalLM, LSGMBartModel)

MBART = Family(
    config_class=LSGMBartConfig,
    models=(
        LSGMBartModel,
        LSGMBartForConditionalGeneration,
        LSGMBartForSequenceClassification,
        LSGMBartForQuestionAnswering,
        LSGMBartForCausalLM,
    ),
    default=LSGMBartForConditionalGeneration,
    tables=BART.tables,
    position_offset=2,
)
