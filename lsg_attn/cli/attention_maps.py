"""Attention maps: a model reads a document once with each sparsity type, and one layer's attention is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..dispatch import answer_here, answered_by
from ..inspection import attention_weights
from ..models.conversion import convert
from ..pattern import LSGPattern
from .document import read_document

_ROWS = 256  # queries whose weights are computed at once, in all heads


class Map(NamedTuple):
    """A layer's attention with one pattern: ``weights`` (G+T, G+T) of each query (row), the mean over heads."""

    pattern: LSGPattern
    weights: Tensor


class Reading(NamedTuple):
    """What was read, and the maps of it.

    Attributes:
        source, model: the names of the document and the model, without the folders that they are in.
        total: the tokens of the whole document, of which ``pieces`` may be the first, special ones included.
        pieces: the G globals' names and each token's text, with what comes before it in the document; a special token
            that is not in the document has its name.
        special: positions of the globals and the special tokens.
        layer, num_layers, num_heads: which layer was kept, from 0, of how many, and its heads.
        maps: one for each sparsity type.
    """

    source: str
    model: str
    total: int
    pieces: list[str]
    special: list[int]
    layer: int
    num_layers: int
    num_heads: int
    maps: list[Map]


def read_maps(
    file: Path | None,
    model: str,
    sparsity_types: Sequence[str],
    *,
    num_tokens: int = 512,
    layer: int | None = None,
    **sizes: Any,
) -> Reading:
    """Read the first tokens of a document with each sparsity type in all layers.

    Args:
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.
        model: name or folder of a model of one of the families. A plain one is converted, and one with fewer positions
            than ``num_tokens`` extended, as :func:`lsg_attn.models.convert` does.
        sparsity_types: the types, at least one.
        num_tokens: how many tokens to read, special ones included; at least 3.
        layer: the encoder layer, from 0; by default the middle one.
        **sizes: keys of the configuration to change, such as ``block_size``.

    Raises:
        OSError: the file or the model cannot be read.
        ValueError: a number is out of range, the document has no tokens, the sizes contradict each other, or the model
            is of no family or has no fast tokenizer.
    """
    if num_tokens < 3:
        raise ValueError(f"--tokens: expected at least 3, got {num_tokens}")
    document = read_document(file)
    reader, tokenizer = convert(model, num_tokens, sparsity_type=sparsity_types[0], **sizes)
    ids, pieces, special, total = tokens_of(tokenizer, document.text, num_tokens)
    if len(special) == len(pieces):
        raise ValueError(f"{document.source} has no tokens")
    base = reader.float().base_model
    encoder, config = base.get_encoder() if base.config.is_encoder_decoder else base, base.config
    num_layers = config.num_hidden_layers
    layer = num_layers // 2 if layer is None else layer
    if not 0 <= layer < num_layers:
        raise ValueError(f"--layer: expected 0 to {num_layers - 1}, got {layer}")
    maps = []
    for sparsity_type in sparsity_types:
        config.sparsity_type = sparsity_type
        call = _call_of_layer(encoder, ids, layer)
        maps.append(Map(call.pattern, _mean_weights(call)))
    first = config.num_global_tokens
    return Reading(
        document.source if file is None else file.name,
        os.path.basename(os.path.abspath(model)),
        total,
        [f"global {n}" for n in range(first)] + pieces,
        [*range(first), *(first + position for position in special)],
        layer,
        num_layers,
        call.query.shape[1],
        maps,
    )


def tokens_of(tokenizer: Any, text: str, num_tokens: int) -> tuple[Tensor, list[str], list[int], int]:
    """The ids (1, T) of the first tokens, their texts, which of them are special, and how many all tokens are.

    Raises:
        ValueError: the tokenizer does not tell where in the text a token is.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: expected a fast one, which tells where in the text a token is, got {type(tokenizer).__name__}"
        )
    total = len(tokenizer(text, verbose=False).input_ids)
    found = tokenizer(
        text, truncation=True, max_length=num_tokens, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    pieces, special, end = [], [], 0
    rows = zip(found.input_ids, found.offset_mapping, found.special_tokens_mask, strict=True)
    for position, (token, (_, stop), is_special) in enumerate(rows):
        if is_special:
            special.append(position)
            pieces.append(tokenizer.convert_ids_to_tokens(token))
        else:
            pieces.append(text[end : max(end, stop)])  # of one character's several tokens, the later ones are empty
            end = max(end, stop)
    return torch.tensor([found.input_ids]), pieces, special, total


def _call_of_layer(encoder: Any, ids: Tensor, layer: int) -> Call:
    """The attention call of one layer as the encoder reads ids (1, T)."""
    calls: dict[int, Call] = {}
    numbers = count()

    def keep_and_answer(call: Call, implementation: str, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        if next(numbers) == layer:
            calls[layer] = call
        return answer_here(call, implementation, return_lse)

    with torch.inference_mode(), answered_by(keep_and_answer):
        encoder(input_ids=ids)
    return calls[layer]


def _mean_weights(call: Call) -> Tensor:
    """The weights (G+T, G+T) of a call of one document, the mean over heads."""
    means = [
        attention_weights(
            call.query, call.key, call.pattern, call.attention_mask, rows=rows, scale=call.scale,
            lsh_projections=call.projections or None,
        )[0].mean(0)
        for rows in torch.arange(call.query.shape[2]).split(_ROWS)
    ]  # fmt: skip
    return torch.cat(means)
