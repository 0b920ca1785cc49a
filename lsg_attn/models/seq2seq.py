"""Encoder-decoders: transformers' decoder behind an encoder with global tokens and LSG attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ..layer import LSGAttention
from ..pattern import LSGPattern
from .encoder import LSGEncoder, hide_first_token
from .family import GLOBAL_ROWS
from .heads import LSGModel, check_config
from .packing import Packed


class LSGEncoderLayer(nn.Module):
    """An encoder layer with LSG attention, (batch, G+T, d_model) -> (batch, G+T, d_model). Mixed into a plain layer."""

    fc1: nn.Module
    fc2: nn.Module
    self_attn_layer_norm: nn.Module
    final_layer_norm: nn.Module
    activation_fn: Callable[[Tensor], Tensor]
    dropout: float
    activation_dropout: float
    norms_first: ClassVar[bool] = False  # whether each sublayer's norm comes before it, and not after its residual

    def __init__(self, config: Any, pattern: LSGPattern) -> None:
        super().__init__(config)
        self.self_attn = LSGAttention(
            config.d_model,
            config.encoder_attention_heads,
            pattern,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | Packed | None = None) -> Tensor:
        """Attention, then feed-forward, each with a residual and a norm; ``attention_mask``: (batch, T), or Packed."""
        hidden_states = self._sublayer(hidden_states, self.self_attn_layer_norm, self._attend, attention_mask)
        hidden_states = self._sublayer(hidden_states, self.final_layer_norm, self._feed_forward)
        if hidden_states.dtype == torch.float16:  # activations can overflow
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states

    def _sublayer(self, x: Tensor, norm: nn.Module, inner: Any, *args: Any) -> Tensor:
        out: Tensor
        if self.norms_first:
            out = x + self._dropout(inner(norm(x), *args), self.dropout)
        else:
            out = norm(x + self._dropout(inner(x, *args), self.dropout))
        return out

    def _attend(self, x: Tensor, mask: Tensor | Packed | None) -> Tensor:
        out: Tensor
        if isinstance(mask, Packed):
            out = self.self_attn(x[0], cu_seqlens=mask.cu_seqlens, max_seqlen=mask.max_seqlen).unsqueeze(0)
        else:
            out = self.self_attn(x, mask)
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self._dropout(self.activation_fn(self.fc1(x)), self.activation_dropout))
        return out

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(x, p, self.training)


class LSGSeq2SeqEncoder(LSGEncoder):
    """An encoder with global embeddings before the tokens and LSG attention in every layer. Mixed into a plain encoder.

    Args:
        config: the configuration of the whole model.
    """

    layer_class: ClassVar[type[Any]]
    word_class: ClassVar[type[Any]]
    position_class: ClassVar[type[Any]]
    embeds_with_norm: ClassVar[bool] = True  # whether a norm follows the embeddings

    def __init__(self, config: Any) -> None:
        check_config(config, self.config_class)
        # not the plain class's constructor, which would build its layers only to replace them
        PreTrainedModel.__init__(self, config)
        pattern = config.lsg_pattern()
        self._lsg_values = config.lsg_values()
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.padding_idx = config.pad_token_id
        self.max_source_positions = config.max_position_embeddings
        self.embed_tokens = self.word_embedding(config)
        self.embed_positions = self.position_embedding(config)
        self.global_embeddings = nn.Embedding(GLOBAL_ROWS, config.d_model)
        self.layers = nn.ModuleList(self.layer_class(config, pattern) for _ in range(config.encoder_layers))
        if self.embeds_with_norm:
            self.layernorm_embedding = nn.LayerNorm(config.d_model)
        if self.layer_class.norms_first:
            self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def word_embedding(cls, config: Any) -> Any:
        """A new token embedding, the plain model's own, with its scale."""
        scale = embedding_scale(config)
        return cls.word_class(config.vocab_size, config.d_model, config.pad_token_id, embed_scale=scale)

    @classmethod
    def position_embedding(cls, config: Any) -> Any:
        """A new position embedding, the plain model's own."""
        return cls.position_class(config.max_position_embeddings, config.d_model)

    def embed_words(self, input_ids: Tensor | None) -> Tensor:
        """The token embeddings (batch, T, d_model) of ids (batch, T), scaled."""
        out: Tensor = self.embed_tokens(input_ids)
        return out

    def positions(self, inputs_embeds: Tensor, first: int = 0) -> Tensor:
        """The position embeddings of tokens (batch, T, d_model), which start at the position ``first``."""
        out: Tensor = self.embed_positions(inputs_embeds[..., -1], first)  # it reads only the shape
        return out.to(inputs_embeds.device)

    def global_table(self) -> nn.Embedding:
        return self.global_embeddings

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
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode documents of up to ``config.max_position_embeddings`` tokens.

        Args:
            input_ids: (batch, T) integers. Exactly one of ``input_ids`` and ``inputs_embeds`` must be given.
            attention_mask: (batch, T) of any dtype, nonzero for tokens and zero for padding.
            inputs_embeds: (batch, T, d_model).
            head_mask: must be None. LSG attention computes no matrix of probabilities to mask.
            output_attentions: if true, a warning says that there are none, for the same reason.
            output_hidden_states: whether to return the states before the first layer and after each layer.
            return_dict: whether to return a ``BaseModelOutput`` instead of a tuple.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed documents, as in
                :class:`.encoder.LSGEncoderModel`. The decoder takes none.

        Returns:
            ``last_hidden_state``: (batch, G+T, d_model), or (batch, T, d_model) if the configuration does not pass the
            global tokens to the decoder. ``hidden_states``: each (batch, G+T, d_model). ``attentions``: None.

        Raises:
            TypeError, ValueError: an argument is not as above, or T is more than ``config.max_position_embeddings``.
        """
        config = self.config
        self.check_inputs(input_ids, inputs_embeds, head_mask)
        if config.output_attentions if output_attentions is None else output_attentions:
            warnings.warn(
                "output_attentions: the encoder's are None, as LSG attention computes no matrix of probabilities; the "
                "decoder's are returned",
                stacklevel=2,
            )
        self.update_pattern()
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        mask = self.mask_or_packed(attention_mask, tokens, lengths)
        packed = mask if isinstance(mask, Packed) else None
        num_tokens = tokens.shape[1] if packed is None else packed.max_seqlen - config.num_global_tokens
        self.check_length(num_tokens, self.max_source_positions)
        tokens, mask = self.sharing.own(tokens), mask if packed is not None else self.sharing.own(mask)
        words = self.embed_words(tokens) if inputs_embeds is None else tokens
        positions = self.positions(words[:, :num_tokens], self.sharing.first_token(num_tokens))
        if packed is not None:
            positions = positions.expand(1, *positions.shape[-2:])[:, packed.positions]

        hidden_states = self.with_global_tokens(words + positions, packed)
        if self.embeds_with_norm:
            hidden_states = self.layernorm_embedding(hidden_states)
        hidden_states, all_states = self.run_layers(
            self.layers,
            nn.functional.dropout(hidden_states, self.dropout, self.training),
            mask,
            keep_all=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            layerdrop=self.layerdrop,
        )
        if self.layer_class.norms_first:
            hidden_states = self.layer_norm(hidden_states)
        last = self.without_global_tokens(hidden_states, packed) if config.drops_global_tokens else hidden_states
        output = BaseModelOutput(last_hidden_state=last, hidden_states=all_states)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class LSGSeq2SeqModel(LSGModel):
    """An encoder-decoder with an LSG encoder: the arguments and results of its plain class, such as BartModel.

    Only the first four arguments can be positional, since the order of the others depends on the version of
    transformers. ``attention_mask`` is (batch, T), without the global tokens, even if ``encoder_outputs`` is given.
    """

    encoder_class: ClassVar[type[Any]]
    decoder_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        check_config(config, self.config_class)
        PreTrainedModel.__init__(self, config)
        self.shared = self.encoder_class.word_embedding(config)
        self.encoder = self.encoder_class(config)
        self.decoder = self.decoder_class(config)
        if isinstance(self._tied_weights_keys, list) and not hasattr(self, "_tie_weights"):
            self.set_input_embeddings(self.shared)  # how transformers 4 ties Pegasus's embeddings
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
        """Encode unless ``encoder_outputs`` is given, then decode with the plain class's ``forward``.

        ``decoder_kwargs`` are further arguments of that ``forward``.

        Raises:
            TypeError, ValueError: as in the encoder; ``attention_mask`` does not fit the encoder's states; or there are
                more tokens for the decoder than it has positions.
        """
        longest = self.config.max_position_embeddings
        if decoder_input_ids is not None and decoder_input_ids.shape[-1] > longest:
            raise ValueError(
                f"decoder_input_ids: expected at most max_position_embeddings={longest} tokens, got "
                f"{decoder_input_ids.shape[-1]}; truncate the labels"
            )
        if packed := [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if decoder_kwargs.get(name) is not None]:
            raise ValueError(f"{packed[0]}: expected None, as the decoder would see all of the packed documents")
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
        config = self.config
        num_globals = 0 if config.drops_global_tokens else config.num_global_tokens
        expected = (states.shape[0], states.shape[1] - num_globals)
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(
                f"attention_mask: expected shape (batch, T) = {expected}, got {tuple(attention_mask.shape)}; the "
                f"encoder's states have shape {tuple(states.shape)}, the first {num_globals} belong to global tokens"
            )
        if config.mask_first_token:
            attention_mask = hide_first_token(attention_mask, states[:, num_globals:])
        return None if attention_mask is None else nn.functional.pad(attention_mask, (num_globals, 0), value=1)


def embedding_scale(config: Any) -> float:
    """The factor of the token embeddings."""
    return math.sqrt(config.d_model) if config.scale_embedding else 1.0
