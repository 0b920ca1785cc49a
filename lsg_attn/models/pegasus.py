"""LSG-Pegasus: Pegasus with an LSG encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PegasusConfig, PegasusForCausalLM, PegasusForConditionalGeneration, PegasusModel
from transformers.models.pegasus.modeling_pegasus import (
    PegasusDecoder,
    PegasusEncoder,
    PegasusEncoderLayer,
    PegasusSinusoidalPositionalEmbedding,
)

from .bart import BART
from .configuration import LSGSeq2SeqConfig, lsg_config
from .family import Family
from .heads import lsg_decoder, lsg_head
from .seq2seq import LSGEncoderLayer, LSGSeq2SeqEncoder, LSGSeq2SeqModel, embedding_scale

LSGPegasusConfig = lsg_config("Pegasus", PegasusConfig, __name__, LSGSeq2SeqConfig)


class LSGPegasusEncoderLayer(LSGEncoderLayer, PegasusEncoderLayer):
    """Pegasus's encoder layer with LSG attention."""

    norms_first = True


class LSGPegasusEncoder(LSGSeq2SeqEncoder, PegasusEncoder):
    """Pegasus's encoder with global embeddings before the tokens and LSG attention in every layer."""

    plain_class, config_class, layer_class = PegasusEncoder, LSGPegasusConfig, LSGPegasusEncoderLayer
    position_class = PegasusSinusoidalPositionalEmbedding
    embeds_with_norm = False
    _no_split_modules = ["LSGPegasusEncoderLayer", "PegasusDecoderLayer"]  # noqa: RUF012  # transformers needs a list

    @classmethod
    def word_embedding(cls, config: Any) -> Any:
        """A new token embedding; the encoder applies its scale."""
        return nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)

    @classmethod
    def position_embedding(cls, config: Any) -> Any:
        return super().position_embedding(config).requires_grad_(False)

    def embed_words(self, input_ids: Tensor | None) -> Tensor:
        return super().embed_words(input_ids) * embedding_scale(self.config)

    def positions(self, inputs_embeds: Tensor, first: int = 0) -> Tensor:
        out: Tensor = self.embed_positions(inputs_embeds.shape[:2], first)
        return out.to(inputs_embeds.device)


class LSGPegasusModel(LSGSeq2SeqModel, PegasusModel):
    """Pegasus with an LSG encoder. It has the arguments and results of :class:`transformers.PegasusModel`."""

    plain_class, config_class = PegasusModel, LSGPegasusConfig
    encoder_class, decoder_class = LSGPegasusEncoder, PegasusDecoder
    _no_split_modules = LSGPegasusEncoder._no_split_modules


LSGPegasusForConditionalGeneration = lsg_head(PegasusForConditionalGeneration, LSGPegasusModel)
LSGPegasusForCausalLM = lsg_decoder(PegasusForCausalLM, LSGPegasusModel)

PEGASUS = Family(
    config_class=LSGPegasusConfig,
    models=(LSGPegasusModel, LSGPegasusForConditionalGeneration, LSGPegasusForCausalLM),
    default=LSGPegasusForConditionalGeneration,
    tables=BART.tables,
    sinusoidal=True,
)
