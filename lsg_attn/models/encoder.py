"""What every LSG encoder does: global tokens in front, masks, layers, and what leaves the encoder.

:class:`LSGEncoder` is the part that all families share, :class:`LSGEncoderModel` a whole encoder-only model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from einops import repeat
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import ModelOutput

from ..checks import type_name
from ..layer import LSGAttention
from ..pattern import LSGPattern
from .family import GLOBAL_ROWS
from .heads import LSGModel
from .packing import Packed, pack
from .sharing import ALONE, Alone


class LSGSelfAttention(LSGAttention):
    """The self-attention of a plain encoder's layer, with its projections under their names, and an LSG pattern.

    Args:
        plain: the module that it replaces.
        names: of the modules that it takes over: the projections of queries, keys and values, then any others.
        pattern, num_heads, dropout, implementation: as in :class:`lsg_attn.LSGAttention`.
    """

    def __init__(
        self,
        plain: nn.Module,
        names: tuple[str, ...],
        pattern: LSGPattern,
        *,
        num_heads: int,
        dropout: float,
        implementation: str,
    ) -> None:
        nn.Module.__init__(self)
        for name in names:
            setattr(self, name, getattr(plain, name))
        self.names = names
        self.embed_dim: int = getattr(self, names[0]).in_features
        self.num_heads, self.pattern, self.dropout, self.implementation = num_heads, pattern, dropout, implementation

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        query, key, value = (getattr(self, name) for name in self.names[:3])
        return query, key, value

    def attend(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | Packed | None = None
    ) -> Tensor:
        """The weighted values (batch, G+T, width), heads side by side, or of packed documents (1, rows, width).

        In a causal model the original computes no attention for global tokens: their result is their query itself.
        """
        if isinstance(attention_mask, Packed):
            cu_seqlens, max_seqlen = attention_mask.cu_seqlens, attention_mask.max_seqlen
            out = super().attend(hidden_states[0], cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).unsqueeze(0)
            rows = attention_mask.global_rows.flatten()
        else:
            out = super().attend(hidden_states, attention_mask)
            rows = torch.arange(self.pattern.num_global_tokens, device=out.device)
        if not self.pattern.causal:
            return out
        return out.index_copy(1, rows, self.projections()[0](hidden_states[:, rows]))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | Packed | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """As a plain layer calls it; versions of transformers differ in further arguments, which are all None here."""
        return self.attend(hidden_states, attention_mask), None


class LSGEncoder(LSGModel):
    """The part of a model that has the global embeddings and the layers. Mixed into a class of transformers."""

    _lsg_values: tuple[Any, ...]
    packs_documents: bool = True  # whether what is on top takes packed documents
    sharing: Alone = ALONE  # what of each document this process has

    def global_table(self) -> nn.Embedding:
        """The embeddings (512, width) of the global tokens."""
        raise NotImplementedError

    def update_pattern(self) -> None:
        """Follow changes of the configuration's pattern that were made after the model was built.

        Raises:
            TypeError, ValueError: as in the configuration's constructor.
        """
        if (values := self.config.lsg_values()) != self._lsg_values:
            pattern = self.config.lsg_pattern()
            for module in self.modules():
                if isinstance(module, LSGAttention):
                    module.pattern, module.implementation = pattern, self.config.attention_implementation
            self._lsg_values = values

    def check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, head_mask: object) -> None:
        """Check what any encoder asks of its arguments.

        Raises:
            TypeError: the tokens are no tensor.
            ValueError: a head mask, not exactly one of ``input_ids`` and ``inputs_embeds``, or no token.
        """
        if head_mask is not None:
            raise ValueError(
                f"head_mask: expected None, got {type_name(head_mask)}; the encoder computes no matrix of probabilities"
            )
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"expected exactly one of input_ids and inputs_embeds, got {given}")
        name, shape = ("input_ids", "(batch, T)") if inputs_embeds is None else ("inputs_embeds", "(batch, T, width)")
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if not isinstance(tokens, Tensor):
            advice = (
                "pass what a tokenizer returns as model(**batch)"
                if isinstance(tokens, Mapping)
                else "a tokenizer makes one of texts with return_tensors='pt', padding=True"
            )
            raise TypeError(f"{name}: expected a torch.Tensor, got {type_name(tokens)}; {advice}")
        if tokens.dim() != 2 + (inputs_embeds is not None) or tokens.shape[1] < 1:
            raise ValueError(f"{name}: expected shape {shape} with T >= 1, got {tuple(tokens.shape)}")

    def check_length(self, num_tokens: int, longest: int) -> None:
        """Check that every token of a document has a position.

        Raises:
            ValueError: it has none.
        """
        if num_tokens > longest:
            name = "max_position_embeddings"
            offset = self.config.max_position_embeddings - longest
            limit = f"{name}={longest}" if not offset else f"{name}-{offset}={longest}"
            raise ValueError(
                f"expected at most {limit} tokens, got {num_tokens}; truncate the document (truncation=True, "
                f"max_length={longest} of the tokenizer) or extend the model with lsg_attn.models.convert"
            )

    def mask_or_packed(
        self, attention_mask: Tensor | None, tokens: Tensor, lengths: tuple[Any, ...]
    ) -> Tensor | Packed | None:
        """What the attention layers take: a mask (batch, T) of bool or integers, or where packed documents are.

        ``tokens``: (batch, T, ...), ids or embeddings; ``lengths``: see :func:`.packing.pack`.

        Raises:
            TypeError, ValueError: the mask has another shape, the lengths do not fit, or both are given.
        """
        packed = pack(lengths, tokens, self.config.num_global_tokens)
        if packed is None:
            return self.token_mask(attention_mask, tokens)
        if self.sharing is not ALONE:
            raise ValueError("cu_seq_lens_q: expected None, as parallelize shares out whole documents")
        if not self.packs_documents:
            raise ValueError(
                "cu_seq_lens_q: expected None, as the model's head reads the first token of the batch alone"
            )
        if attention_mask is not None or self.config.mask_first_token:
            what = "attention_mask" if attention_mask is not None else "config.mask_first_token"
            raise ValueError(f"{what}: expected none with cu_seq_lens_q, as packed documents have no padding")
        return packed

    def token_mask(self, attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """The mask (batch, T) that the attention layers take, of bool or integers; ``tokens``: (batch, T, ...).

        Raises:
            ValueError: it has another shape.
        """
        if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
            expected, got = tuple(tokens.shape[:2]), tuple(attention_mask.shape)
            raise ValueError(f"attention_mask: expected shape (batch, T) = {expected}, got {got}")
        if self.config.mask_first_token:
            attention_mask = hide_first_token(attention_mask, tokens)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask != 0  # transformers accepts such a mask, LSGAttention does not
        return attention_mask

    def with_global_tokens(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        """(batch, T, width) -> (batch, G+T, width): the global tokens' embeddings in front of each document."""
        globals_ = self.global_table()(torch.arange(self.config.num_global_tokens, device=tokens.device))
        if packed is not None:
            return packed.with_globals(tokens, globals_)
        return torch.cat([repeat(globals_, "g d -> b g d", b=len(tokens)), tokens], dim=1)

    def run_layers(
        self,
        layers: Iterable[nn.Module],
        hidden_states: Tensor,
        *args: Any,
        keep_all: bool = False,
        layerdrop: float = 0.0,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Send states (batch, G+T, width) through layers; with ``keep_all``, return the states between them, too."""
        all_states: tuple[Tensor, ...] = ()
        if self.training and layerdrop > 0 and self.sharing is not ALONE:
            raise ValueError(f"encoder_layerdrop: expected 0 where processes share out documents, got {layerdrop}")
        for layer in layers:
            if self.training:
                hidden_states = self.sharing.before_layer(hidden_states)
            all_states = (*all_states, hidden_states) if keep_all else ()
            if self.training and layerdrop > 0 and torch.rand([]) < layerdrop:
                continue  # LayerDrop (arXiv 1909.11556)
            if self.gradient_checkpointing and self.training and not hasattr(layer, "gradient_checkpointing"):
                # Since transformers 4.53 most layers do this themselves.
                out = self._gradient_checkpointing_func(layer.__call__, hidden_states, *args)
            else:
                out = layer(hidden_states, *args)
            hidden_states = out[0] if isinstance(out, tuple) else out
        if not keep_all:
            return self.sharing.after_layers(hidden_states), None
        all_states = tuple(self.sharing.after_layers(x) for x in (*all_states, hidden_states))
        return all_states[-1], all_states

    def without_global_tokens(self, hidden_states: Tensor, packed: Packed | None = None) -> Tensor:
        """(batch, G+T, width) -> (batch, T, width). With ``pool_with_global``, row 0 is global token 0's state."""
        if packed is not None:
            tokens = hidden_states[:, packed.token_rows]
            if not self.config.pool_with_global:
                return tokens
            return tokens.index_copy(1, packed.first_tokens, hidden_states[:, packed.global_rows[:, 0]])
        if self.config.pool_with_global and self.sharing.has_first_token:
            return torch.cat([hidden_states[:, :1], hidden_states[:, self.config.num_global_tokens + 1 :]], dim=1)
        return hidden_states[:, self.config.num_global_tokens :]


class LSGEncoderModel(LSGEncoder):
    """An encoder-only model: transformers' own, with global tokens and LSG attention. Mixed into its base model."""

    attention_class: ClassVar[type[LSGSelfAttention]] = LSGSelfAttention
    attention_path: ClassVar[str] = "attention.self"  # in a layer
    attention_names: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    dropout_key: ClassVar[str] = "attention_probs_dropout_prob"

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        pattern = config.lsg_pattern()
        for layer in dict.fromkeys(self.ordered_layers()):
            owner, _, name = self.attention_path.rpartition(".")
            module = layer.get_submodule(owner)
            attention = self.attention_class(
                getattr(module, name),
                self.attention_names,
                pattern,
                num_heads=config.num_attention_heads,
                dropout=getattr(config, self.dropout_key),
                implementation=config.attention_implementation,
            )
            setattr(module, name, attention)
        self._lsg_values = config.lsg_values()
        width = self.embeddings.word_embeddings.embedding_dim
        self.embeddings.global_embeddings = nn.Embedding(GLOBAL_ROWS, width)
        self.gradient_checkpointing = False
        self.post_init()

    def global_table(self) -> nn.Embedding:
        table: nn.Embedding = self.embeddings.global_embeddings
        return table

    def ordered_layers(self) -> list[nn.Module]:
        """The layers in the order of their use."""
        return list(self.encoder.layer)

    def position_ids(self, input_ids: Tensor | None, tokens: Tensor) -> Tensor:
        """The tokens' rows (batch or 1, T) of the position table; ``tokens``: (batch, T, ...)."""
        return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)

    def position_offset(self) -> int:
        """The number of rows of the position table before position 0."""
        return 0

    def project(self, hidden_states: Tensor) -> Tensor:
        """Embeddings (batch, G+T, embedding width) to the layers' width."""
        return hidden_states

    def pool(self, hidden_states: Tensor) -> Tensor | None:
        """The pooled output (batch, width) of states (batch, T, width), or None if the model has no pooler."""
        pooler = getattr(self, "pooler", None)
        return None if pooler is None else pooler(hidden_states)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        num_items_in_batch: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Encode documents.

        Args:
            input_ids: (batch, T) integers. Exactly one of ``input_ids`` and ``inputs_embeds`` must be given.
            attention_mask: (batch, T) of any dtype, nonzero for tokens and zero for padding.
            token_type_ids: (batch, T) integers, by default 0. Not in a model without segments.
            position_ids: (batch, T) or (1, T) integers, by default those of transformers' own model.
            inputs_embeds: (batch, T, embedding width), instead of the token embeddings.
            encoder_hidden_states, encoder_attention_mask: (batch, S, width) and (batch, S), for cross-attention in a
                model with ``config.add_cross_attention``.
            head_mask, cache, past_key_values: must be None.
            use_cache, output_attentions: must not be true.
            output_hidden_states: whether to return the states before the first layer and after each layer.
            return_dict: whether to return a ModelOutput instead of a tuple.
            cache_position, num_items_in_batch: not used; ``generate`` and the Trainer pass them.
            cu_seq_lens_q, cu_seq_lens_k: (n + 1,) integers, of n documents that are packed without padding into a batch
                of 1, as ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` gives them: where each starts,
                and the last one stops. Each document then has its own global tokens and positions.
            max_length_q, max_length_k: the length of the longest of these documents.

        Returns:
            ``last_hidden_state``: (batch, T, width), without the global tokens. ``hidden_states``: each
            (batch, G+T, width), of packed documents the rows of each one after the other. ``pooler_output``: (batch,
            width), or (n, width) of packed documents, if the model has a pooler.

        Raises:
            TypeError, ValueError: an argument is not as above, or T is more than the model's positions.
        """
        config = self.config
        self.check_inputs(input_ids, inputs_embeds, head_mask)
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions: expected False, got True; LSG attention computes no matrix of probabilities"
            )
        if cache is not None or past_key_values is not None or use_cache:
            raise ValueError(
                "use_cache: expected False, and no cache or past_key_values; LSG attention has no cache. Generate with "
                "use_cache=False"
            )
        self.update_pattern()
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        mask = self.mask_or_packed(attention_mask, tokens, (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k))
        packed = mask if isinstance(mask, Packed) else None
        num_tokens = tokens.shape[1] if packed is None else packed.max_seqlen - config.num_global_tokens
        self.check_length(num_tokens, config.max_position_embeddings - self.position_offset())
        if position_ids is None:
            position_ids = self.position_ids(input_ids if packed is None else None, tokens)
            position_ids = position_ids if packed is None else position_ids[:, packed.positions]
        tokens, position_ids, token_type_ids = map(self.sharing.own, (tokens, position_ids, token_type_ids))
        mask = mask if packed is not None else self.sharing.own(mask)
        words = self.embeddings.word_embeddings(tokens) if inputs_embeds is None else tokens
        hidden_states = self.embed(words, position_ids, token_type_ids, packed)
        hidden_states, all_states = self.run_layers(
            self.ordered_layers(),
            hidden_states,
            mask,
            *self._cross_arguments(encoder_hidden_states, encoder_attention_mask),
            keep_all=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        last = self.without_global_tokens(hidden_states, packed)
        first = self.sharing.first_state(last) if packed is None else last[0, packed.first_tokens].unsqueeze(1)
        pooled = self.pool(first)
        if not (config.return_dict if return_dict is None else return_dict):
            found = (last, pooled) if hasattr(self, "pooler") else (last,)
            return found if all_states is None else (*found, all_states)
        if not hasattr(self, "pooler"):
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last, hidden_states=all_states)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last, pooler_output=pooled, hidden_states=all_states
        )

    def embed(
        self, words: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, packed: Packed | None
    ) -> Tensor:
        """Token embeddings (batch, T, embedding width) to the first layer's input (batch, G+T, width)."""
        embeddings = self.embeddings
        tokens = words + embeddings.position_embeddings(position_ids)
        if hasattr(embeddings, "token_type_embeddings"):
            if token_type_ids is None:
                token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
            tokens = tokens + embeddings.token_type_embeddings(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError(f"token_type_ids: expected None without segments, got {type_name(token_type_ids)}")
        return self.project(embeddings.dropout(embeddings.LayerNorm(self.with_global_tokens(tokens, packed))))

    def _cross_arguments(self, states: Tensor | None, mask: Tensor | None) -> tuple[Any, ...]:
        """A layer's arguments after the mask, for cross-attention over states (batch, S, width)."""
        if states is None:
            return ()
        layer = self.ordered_layers()[0]
        if not hasattr(layer, "crossattention"):
            raise ValueError("encoder_hidden_states: expected None for a model without config.add_cross_attention")
        if mask is None:
            mask = states.new_ones(states.shape[:2])
        bias = torch.zeros_like(mask, dtype=states.dtype).masked_fill(mask == 0, torch.finfo(states.dtype).min)
        # Before transformers 5 a head mask came first. By position: checkpointing differentiates no other arguments.
        head_mask = (None,) if "head_mask" in inspect.signature(layer.forward).parameters else ()
        return (*head_mask, states, bias[:, None, None, :])


def hide_first_token(attention_mask: Tensor | None, states: Tensor) -> Tensor:
    """The mask (batch, T) of ``states`` (batch, T, width), by default all ones, with 0 for the first token."""
    mask = states.new_ones(states.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
