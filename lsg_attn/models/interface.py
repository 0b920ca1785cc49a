"""``attn_implementation="lsg"``: LSG attention in any encoder of transformers that lets its attention be chosen.

transformers 5 hands a registered function queries and keys after any rotary embedding, so models with positions of any
kind work, without a conversion. Nothing here adds global tokens: the first G tokens of the sequence are the globals.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import type_name
from ..functional import lsg_attention
from ..pattern import LSGPattern
from .heads import LSGModel

NAME = "lsg"
_IS_SUPPORTED = Version(transformers.__version__) >= Version("5.0.1")
_CONFIG_KEY = "lsg_attention"
_CHANGES_OF_SCORES = ("position_bias", "softcap", "s_aux", "head_mask")


def register_attention() -> None:
    """Register ``attn_implementation="lsg"``, with the mask that it takes. Before transformers 5, do nothing."""
    if _IS_SUPPORTED:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, lsg_attention_forward)
        # Without a function for the mask, transformers would silently pass none.
        AttentionMaskInterface.register(NAME, lsg_mask)


def use_lsg(model: PreTrainedModel, pattern: LSGPattern | None = None) -> PreTrainedModel:
    """Give an encoder of transformers LSG attention, in place.

    ``attn_implementation="lsg"`` in ``from_pretrained`` does the same with the default pattern. The pattern is kept in
    ``model.config.lsg_attention`` and saved with it. Layers with a sliding window, as in ModernBERT, keep it.

    Args:
        model: an encoder whose attention can be chosen, such as BertModel or ModernBertForMaskedLM.
        pattern: who sees whom; the first ``num_global_tokens`` tokens of each document, such as CLS, are global. By
            default ``LSGPattern()``.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument has another type.
        ValueError: the version of transformers, the model or the pattern does not allow it.
    """
    pattern = LSGPattern() if pattern is None else pattern
    if not isinstance(pattern, LSGPattern):
        raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a model of transformers, got {type_name(model)}")
    if not _IS_SUPPORTED:
        raise ValueError(
            f"use_lsg: expected transformers >= 5.0.1, whose encoders let their attention be chosen, got "
            f"{transformers.__version__}; lsg_attn.models.convert works with this version"
        )
    if isinstance(model, LSGModel):
        raise ValueError(f"model: expected a plain model, got a {type_name(model)}, which has LSG attention")
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"model: expected an encoder, got a {type_name(model)}, which decodes; see lsg_attn.models.convert"
        )
    if not model._supports_attention_backend:
        raise ValueError(f"model: expected one whose attention can be chosen, got a {type_name(model)}")
    if pattern.causal:
        raise ValueError("pattern: expected one that is not causal")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module.config, _CONFIG_KEY, asdict(pattern))
    model.set_attn_implementation(NAME)
    return model


def lsg_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers passes to :func:`lsg_attention_forward`.

    Returns:
        (batch, T), or None without padding; for a layer with a sliding window, the dense mask of it.

    Raises:
        ValueError: the layer's mask is more than padding.
    """
    from transformers.masking_utils import bidirectional_mask_function, flash_attention_mask, sdpa_mask

    given = {"mask_function": mask_function, "attention_mask": attention_mask, **kwargs}
    if local_size is not None and not _is_causal(mask_function):
        window: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, local_size=local_size, **given)
        return window
    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            'attn_implementation="lsg": expected an encoder whose tokens all see each other, except padding; this '
            "model's mask says otherwise (causal, or made of several documents)"
        )
    padding: Tensor | None = flash_attention_mask(batch_size, q_length, kv_length, **given)
    return padding


def lsg_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer's attention; its ``config.lsg_attention`` has the fields of the pattern.
        query: (batch, heads, T, head_dim).
        key, value: (batch, heads or a divisor of them, T, head_dim).
        attention_mask: as :func:`lsg_mask` makes it.
        dropout, scaling: as in :func:`lsg_attn.lsg_attention`.
        sliding_window: the layer's window, if it has one; the layer then attends in that window and nowhere else.

    Returns:
        (batch, T, heads, head_dim), and no probabilities.

    Raises:
        ValueError: it is not an encoder's self-attention with no more than padding for a mask.
    """
    if sliding_window is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
        )
        return out, None
    refuse = 'attn_implementation="lsg": expected '
    is_cross = "CrossAttention" in type(module).__name__ or query.shape[2] != key.shape[2]
    if is_cross or getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        raise ValueError(f"{refuse}an encoder's self-attention, got the {type_name(module)} of a decoder")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"{refuse}a mask (batch, T) of padding, got shape {tuple(attention_mask.shape)}")
    if changes := [name for name in _CHANGES_OF_SCORES if kwargs.get(name) is not None]:
        raise ValueError(f"{refuse}plain scores, got {', '.join(changes)} of a {type_name(module)}")
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: expected False, got True; LSG attention computes no matrix of probabilities"
        )
    if groups := query.shape[1] // key.shape[1] - 1:
        key, value = (x.repeat_interleave(groups + 1, dim=1) for x in (key, value))
    pattern = LSGPattern(**(getattr(module.config, _CONFIG_KEY, None) or {}))
    out = lsg_attention(query, key, value, pattern, attention_mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


def _is_causal(mask_function: Any) -> bool:
    """Whether a mask's function, or one that it is made of, lets a token see no later token."""
    index = torch.arange(2)
    return not bool(mask_function(index[:1], index[:1], index[:1], index[1:]))
