"""BART with an LSG encoder; the decoder, cross-attention and heads are transformers' own."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
    BartPreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import (
    BartClassificationHead,
    BartDecoder,
    BartEncoder,
    BartEncoderLayer,
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.utils import ModelOutput

from ..checks import type_name
from ..layer import LSGAttention
from ..pattern import LSGPattern
from .configuration import GLOBAL_ROWS, LSGBartConfig


class LSGBartPreTrainedModel(BartPreTrainedModel):
    """Base class of all LSG-BART models.

    A subclass calls this constructor, not the constructor of its BART class, which would build a whole BART only to
    replace its encoder. The subclass then builds BART's modules under BART's names.
    """

    config_class = LSGBartConfig
    _no_split_modules = ["LSGBartEncoderLayer", "BartDecoderLayer"]  # noqa: RUF012  # transformers needs a list

    def __init__(self, config: LSGBartConfig) -> None:
        if not isinstance(config, LSGBartConfig):
            raise TypeError(f"config: expected an LSGBartConfig, got {type_name(config)}")
        BartPreTrainedModel.__init__(self, config)


class LSGBartEncoderLayer(BartEncoderLayer):
    """BART's encoder layer with LSG attention: (batch, G+T, d_model) -> (batch, G+T, d_model)."""

    def __init__(self, config: LSGBartConfig, pattern: LSGPattern) -> None:
        super().__init__(config)
        self.self_attn = LSGAttention(
            config.d_model,
            config.encoder_attention_heads,
            pattern,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attention, then feed-forward, each followed by a residual and a norm; ``attention_mask``: (batch, T)."""
        attended = self._dropout(self.self_attn(hidden_states, attention_mask), self.dropout)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        inner = self._dropout(self.activation_fn(self.fc1(hidden_states)), self.activation_dropout)
        hidden_states = self.final_layer_norm(hidden_states + self._dropout(self.fc2(inner), self.dropout))
        if hidden_states.dtype == torch.float16:  # BART's activations can overflow
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(x, p, self.training)


class LSGBartEncoder(LSGBartPreTrainedModel, BartEncoder):
    """BART's encoder with global embeddings before the tokens and LSG attention in every layer.

    Args:
        config: the configuration of the whole model.
    """

    def __init__(self, config: LSGBartConfig) -> None:
        LSGBartPreTrainedModel.__init__(self, config)
        pattern = config.lsg_pattern()
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.padding_idx = config.pad_token_id
        self.max_source_positions = config.max_position_embeddings
        # Copies, like the pattern: a later change of the configuration does not reach the model.
        self.num_global_tokens = config.num_global_tokens
        self.mask_first_token = config.mask_first_token
        self.pool_with_global = config.pool_with_global
        self.pass_global_tokens_to_decoder = config.pass_global_tokens_to_decoder
        self.embed_tokens = word_embedding(config)
        self.embed_positions = BartLearnedPositionalEmbedding(config.max_position_embeddings, config.d_model)
        self.global_embeddings = nn.Embedding(GLOBAL_ROWS, config.d_model)
        self.layers = nn.ModuleList(LSGBartEncoderLayer(config, pattern) for _ in range(config.encoder_layers))
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        head_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode documents of up to ``config.max_position_embeddings`` tokens.

        Args:
            input_ids: (batch, T) integers. Exactly one of ``input_ids`` and ``inputs_embeds`` must be given.
            attention_mask: (batch, T) of any dtype, nonzero for tokens and zero for padding.
            inputs_embeds: (batch, T, d_model).
            head_mask: must be None. LSG attention computes no matrix of probabilities to mask.
            output_attentions: must not be true, for the same reason.
            output_hidden_states: whether to return the states before the first layer and after each layer.
            return_dict: whether to return a ``BaseModelOutput`` instead of a tuple.

        Returns:
            ``last_hidden_state``: (batch, G+T, d_model), or (batch, T, d_model) if the configuration does not pass the
            global tokens to the decoder. ``hidden_states``: each (batch, G+T, d_model).

        Raises:
            ValueError: an argument is not as above, or T is more than ``config.max_position_embeddings``.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions: expected False, got True; the encoder computes no matrix of probabilities. For the "
                "decoder's attentions, run the encoder first and pass its output as encoder_outputs"
            )
        if head_mask is not None:
            raise ValueError(
                f"head_mask: expected None, got {type_name(head_mask)}; the encoder computes no matrix of probabilities"
            )
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"expected exactly one of input_ids and inputs_embeds, got {given}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] > self.max_source_positions:
            raise ValueError(
                f"expected at most max_position_embeddings={self.max_source_positions} tokens, got "
                f"{inputs_embeds.shape[1]}; truncate the document or extend the model with lsg_attn.bart.convert"
            )
        if attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
            expected, got = tuple(inputs_embeds.shape[:2]), tuple(attention_mask.shape)
            raise ValueError(f"attention_mask: expected shape (batch, T) = {expected}, got {got}")
        if self.mask_first_token:
            attention_mask = hide_first_token(attention_mask, inputs_embeds)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask != 0  # BART accepts such a mask, LSGAttention does not
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_states: tuple[Tensor, ...] | None = () if keep_all else None

        hidden_states = self._embed(inputs_embeds)
        for layer in self.layers:
            if all_states is not None:
                all_states = (*all_states, hidden_states)
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue  # LayerDrop (arXiv 1909.11556)
            if self.gradient_checkpointing and self.training and not hasattr(layer, "gradient_checkpointing"):
                # Since transformers 4.53 each layer does this itself.
                hidden_states = self._gradient_checkpointing_func(layer.__call__, hidden_states, attention_mask)
            else:
                hidden_states = layer(hidden_states, attention_mask)
        if all_states is not None:
            all_states = (*all_states, hidden_states)

        output = BaseModelOutput(last_hidden_state=self._for_decoder(hidden_states), hidden_states=all_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _embed(self, inputs_embeds: Tensor) -> Tensor:
        """(batch, T, d_model) -> (batch, G+T, d_model): the global tokens, then the tokens plus their positions."""
        device = inputs_embeds.device
        positions = self.embed_positions(inputs_embeds[..., -1]).to(device)  # it reads only the shape
        rows = torch.arange(self.num_global_tokens, device=device)
        global_states = repeat(self.global_embeddings(rows), "g d -> b g d", b=len(inputs_embeds))
        hidden_states = self.layernorm_embedding(torch.cat([global_states, inputs_embeds + positions], dim=1))
        return nn.functional.dropout(hidden_states, self.dropout, self.training)

    def _for_decoder(self, hidden_states: Tensor) -> Tensor:
        """The encoder's output (batch, G+T, d_model), or (batch, T, d_model) without the global tokens' states."""
        if self.pass_global_tokens_to_decoder:
            return hidden_states
        if self.pool_with_global:
            return torch.cat([hidden_states[:, :1], hidden_states[:, self.num_global_tokens + 1 :]], dim=1)
        return hidden_states[:, self.num_global_tokens :]


class LSGBartModel(LSGBartPreTrainedModel, BartModel):
    """BART with an LSG encoder. It has the arguments and results of :class:`transformers.BartModel`.

    Only the first four arguments can be positional, since the order of the others depends on the version of
    transformers. ``attention_mask`` is (batch, T), without the global tokens, even if ``encoder_outputs`` is given.
    """

    def __init__(self, config: LSGBartConfig) -> None:
        LSGBartPreTrainedModel.__init__(self, config)
        self.shared = word_embedding(config)
        self.encoder = LSGBartEncoder(config)
        self.decoder = BartDecoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: None = None,
        **decoder_kwargs: Any,
    ) -> Any:
        """Encode unless ``encoder_outputs`` is given, then decode with :class:`transformers.BartModel`.

        ``decoder_kwargs`` are further arguments of :class:`transformers.BartModel`.

        Raises:
            ValueError: as in :class:`LSGBartEncoder`, or ``attention_mask`` does not fit the encoder's states.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                head_mask=head_mask,
                output_attentions=decoder_kwargs.get("output_attentions"),
                output_hidden_states=decoder_kwargs.get("output_hidden_states"),
                return_dict=False,
            )
        elif isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = encoder_outputs.to_tuple()
        return super().forward(
            input_ids=input_ids,
            attention_mask=self._cross_attention_mask(attention_mask, encoder_outputs[0]),
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,  # a tuple works with and without return_dict
            **decoder_kwargs,
        )

    def _cross_attention_mask(self, attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
        """Extend the tokens' mask (batch, T) to the encoder's states (batch, T or G+T, d_model)."""
        num_globals = self.encoder.num_global_tokens if self.encoder.pass_global_tokens_to_decoder else 0
        expected = (states.shape[0], states.shape[1] - num_globals)
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(
                f"attention_mask: expected shape (batch, T) = {expected}, got {tuple(attention_mask.shape)}; the "
                f"encoder's states have shape {tuple(states.shape)}, the first {num_globals} belong to global tokens"
            )
        if self.encoder.mask_first_token:
            attention_mask = hide_first_token(attention_mask, states[:, num_globals:])
        return None if attention_mask is None else nn.functional.pad(attention_mask, (num_globals, 0), value=1)


class LSGBartForConditionalGeneration(LSGBartPreTrainedModel, BartForConditionalGeneration):
    """LSG-BART with a language-modeling head: :class:`transformers.BartForConditionalGeneration` for long documents."""

    def __init__(self, config: LSGBartConfig) -> None:
        LSGBartPreTrainedModel.__init__(self, config)
        self.model = LSGBartModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


class LSGBartForSequenceClassification(LSGBartPreTrainedModel, BartForSequenceClassification):
    """LSG-BART with a classification head: :class:`transformers.BartForSequenceClassification` for long documents."""

    def __init__(self, config: LSGBartConfig) -> None:
        LSGBartPreTrainedModel.__init__(self, config)
        self.model = LSGBartModel(config)
        self.classification_head = BartClassificationHead(
            config.d_model, config.d_model, config.num_labels, config.classifier_dropout
        )
        self.post_init()


class LSGBartForQuestionAnswering(LSGBartPreTrainedModel, BartForQuestionAnswering):
    """LSG-BART with a span head: :class:`transformers.BartForQuestionAnswering` for long documents."""

    def __init__(self, config: LSGBartConfig) -> None:
        config.num_labels = 2  # start and end
        LSGBartPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LSGBartModel(config)
        self.qa_outputs = nn.Linear(config.d_model, config.num_labels)
        self.post_init()


class LSGBartForCausalLM(LSGBartPreTrainedModel, BartForCausalLM):
    """BART's decoder alone: :class:`transformers.BartForCausalLM` with the configuration of an LSG-BART.

    A checkpoint of a whole model stores the embeddings as ``model.shared``. Like BartForCausalLM, this class does not
    look there, and transformers warns that the embeddings are newly initialised.
    """

    def __init__(self, config: LSGBartConfig) -> None:
        BartForCausalLM.__init__(self, config)


def word_embedding(config: LSGBartConfig) -> BartScaledWordEmbedding:
    """BART's token embedding, scaled by sqrt(d_model) if ``config.scale_embedding``."""
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    return BartScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, embed_scale=scale)


def hide_first_token(attention_mask: Tensor | None, states: Tensor) -> Tensor:
    """The mask (batch, T) of ``states`` (batch, T, d_model), by default all ones, with 0 for the first token."""
    mask = states.new_ones(states.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
