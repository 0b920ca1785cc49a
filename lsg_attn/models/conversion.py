"""Conversion of a plain model to an LSG model for longer documents, and of an LSG model to another length."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import transformers
from einops import rearrange, repeat
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import has_file

from ..checks import integer, type_name
from .families import FAMILIES, family_of
from .family import GLOBAL_ROWS, Family
from .seq2seq import LSGSeq2SeqModel
from .weights import check_directory, check_named_weights, load_weights

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model")
# Load in the dtype of the checkpoint, as transformers 5 does by default.
SAVED_DTYPE = {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": "auto"}


class Converted(NamedTuple):
    """The result of :func:`convert`."""

    model: Any
    tokenizer: Any


def convert(
    model_or_path: PreTrainedModel | str | Path,
    max_length: int = 4096,
    *,
    tokenizer: Any = None,
    architecture: str | None = None,
    random_global_init: bool = False,
    resize_lsg: bool = True,
    keep_first_global_token: bool = False,
    global_positional_stride: int = 64,
    use_token_ids: bool | None = None,
    use_safetensors: bool = True,
    seed: int = 0,
    **lsg_keys: Any,
) -> Converted:
    """Convert a plain model to an LSG model for ``max_length`` tokens, without training (arXiv 2210.15497).

    The position embeddings are repeated, or cut, to ``max_length``; sines are computed. The first global token is the
    embedding of BOS (or CLS) plus a position embedding. Each other global token is the embedding of MASK plus a
    different position embedding. These others are untrained, and more than one global token makes results worse until
    they are trained. If the source is an LSG model, it keeps its global tokens unless the options say otherwise. The
    source itself is not modified.

    A directory that names an encoder-decoder without a head, such as facebook/bart-base, is converted with the
    language-modeling head: the model was pretrained with it, and its weights are the token embeddings.

    Args:
        model_or_path: a model of one of the families, plain or LSG, or its name or directory.
        max_length: the number of tokens in the longest document, at least 1.
        tokenizer: the model's tokenizer, which gives the ids of BOS and MASK. By default it is loaded from the path.
        architecture: the class to load a path as, with or without "LSG", such as ``"BertForTokenClassification"``. By
            default the one that the path's configuration names. Weights that the path lacks for another head are drawn
            at random, with a warning.
        random_global_init: whether to draw the global tokens, except the first, from a normal distribution with the
            mean and covariance of the token embeddings, instead of using MASK.
        resize_lsg: for an LSG model, whether to keep its global tokens. If not, all are computed anew.
        keep_first_global_token: for an LSG model, whether to keep the first global token and compute all others
            anew.
        global_positional_stride: the distance in positions between most neighbouring global tokens.
        use_token_ids: whether to add the embedding of segment 0 to each global token. By default as lsg-converter does:
            for BERT, ELECTRA and ALBERT.
        use_safetensors: whether to read safetensors alone. False reads a pickle, ``pytorch_model.bin``, by
            ``torch.load(weights_only=True)``.
        seed: the seed of all random numbers. They are used for ``random_global_init``, and for the positions of the
            global tokens if the source has fewer than 512 positions.
        **lsg_keys: the encoder's keys of the configuration, such as ``num_global_tokens``: see
            :class:`lsg_attn.models.configuration.LSGConfig`.

    Returns:
        ``model``: an LSG model with the source's head, dtype, device and attention implementations.
        ``tokenizer``: a copy of the tokenizer with ``model_max_length=max_length``, or None if ``model_or_path`` is a
        model and no tokenizer is given.

    Raises:
        OSError: the path cannot be read, or has no safetensors, only a pickle.
        TypeError: an argument is not of the type named above, or a key is not one of the encoder's keys.
        ValueError: the source is of no family, has no encoder or lacks weights; the tokenizer is missing or has no BOS
            or MASK; a number is out of range; or keys contradict each other.
    """
    max_length = integer("max_length", max_length, 1)
    seed = integer("seed", seed, 0)
    if not isinstance(use_safetensors, bool):
        raise TypeError(f"use_safetensors: expected a bool, got {type_name(use_safetensors)}")
    if isinstance(model_or_path, PreTrainedModel):
        source = model_or_path
        if architecture is not None:
            raise ValueError("architecture: expected None for a model in memory, whose class decides")
        family, target_class = _family_and_class(source.config, type(source).__name__)
    elif isinstance(model_or_path, (str, Path)):
        family, source, target_class = _load(model_or_path, architecture, use_safetensors)
        tokenizer = load_tokenizer(model_or_path) if tokenizer is None else tokenizer
    else:
        raise TypeError(
            f"model_or_path: expected a model of transformers, a name or a directory, got {type_name(model_or_path)}"
        )
    is_lsg = isinstance(source.config, family.config_class)
    keys = family.config_class.lsg_defaults
    if unknown := set(lsg_keys) - set(keys):
        raise TypeError(f"convert: expected keys out of {tuple(keys)}, got {', '.join(sorted(unknown))}")
    if is_lsg:  # to_dict() has neither this key nor attn_implementation
        lsg_keys.setdefault("attention_implementation", source.config.attention_implementation)
    config = family.config_class.from_dict(
        {key: value for key, value in source.config.to_dict().items() if key != "auto_map"},  # it names plain code
        **lsg_keys,
        max_position_embeddings=family.config_length(max_length, source.config),
        attn_implementation=source.config._attn_implementation,
    )

    if keep_first_global_token and not is_lsg:
        raise ValueError(
            f"keep_first_global_token: expected False for a {family.title} without global tokens, got True"
        )
    keeps_globals = is_lsg and resize_lsg and not keep_first_global_token
    if random_global_init and keeps_globals:
        raise ValueError(
            f"random_global_init: expected False for an LSG-{family.title} whose global tokens are kept, got True; use "
            "keep_first_global_token or resize_lsg=False"
        )
    states = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    base = source.base_model
    prefix = "" if base is source else f"{source.base_model_prefix}."
    offset = family.offset(source.config)
    if not keeps_globals:
        bos, mask = _special_ids(config, tokenizer, mask_needed=not random_global_init)
        segments = family.adds_token_type if use_token_ids is None else use_token_ids
        rows = _global_rows(
            states[prefix + family.tables.words],
            states[prefix + family.tables.positions[0]][offset:],
            states[prefix + family.tables.token_types][0] if segments and family.tables.token_types else None,
            bos,
            None if random_global_init else mask,
            global_positional_stride,
            seed,
        )
        name = prefix + family.tables.global_tokens
        states[name] = torch.cat([states[name][:1], rows[1:]]) if keep_first_global_token else rows
    for name in family.tables.positions:
        weight = states[prefix + name]
        resized = sines(max_length, weight) if family.sinusoidal else repeat_positions(weight, max_length, offset)
        states[prefix + name] = resized

    with torch.device("meta"):  # every tensor must come from the source, so none is initialised here
        model = target_class(config)
    model.load_state_dict(states, assign=True)
    _fill_buffers(model, base.device)
    model.tie_weights()
    if model.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = max_length
    return Converted(model.train(source.training), tokenizer)


def repeat_positions(weight: Tensor, length: int, offset: int = 2) -> Tensor:
    """Extend position embeddings (offset + n, width) to (offset + length, width).

    The first ``offset`` rows are not positions and are not repeated.
    """
    head, rows = weight[:offset], weight[offset:]
    copies = -(-length // len(rows))
    return torch.cat([head, repeat(rows, "n d -> (copies n) d", copies=copies)[:length]])


def sines(length: int, like: Tensor) -> Tensor:
    """Pegasus's positions (length, width): sines in the first half of the columns, cosines of the same in the second.

    ``like``: (any, width), which gives the width, dtype and device.
    """
    width = like.shape[1]
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000.0**steps
    return torch.cat([angles.sin(), angles.cos()[:, : width // 2]], dim=1).to(like)


def spread_positions(positions: Tensor, stride: int, generator: torch.Generator) -> Tensor:
    """Choose 512 rows (512, d_model) of ``positions`` (n, d_model), most of them ``stride`` positions apart.

    The first of every n//512 rows is kept, up to 512 rows. Several passes then read the kept rows from the first to
    the last, one row every ``stride`` positions. Each pass starts one kept row after the start of the previous pass.
    If n < 512, the missing rows are drawn from a normal distribution with the mean and standard deviation of each
    column of ``positions``.

    Raises:
        TypeError: ``stride`` is not an integer.
        ValueError: ``stride`` is not a multiple of n//512 (or of 1 if n < 512), or their ratio does not divide 512.
    """
    factor = max(len(positions) // GLOBAL_ROWS, 1)
    step = integer("global_positional_stride", stride, 1) // factor
    if step * factor != stride or GLOBAL_ROWS % step:
        raise ValueError(
            f"global_positional_stride: expected {factor} times a power of 2 up to {GLOBAL_ROWS}, got {stride}"
        )
    if (missing := GLOBAL_ROWS - len(positions)) > 0:
        drawn = torch.randn(missing, positions.shape[1], generator=generator)
        positions = torch.cat([positions, positions.mean(dim=0) + drawn * positions.std(dim=0)])
    kept = positions[::factor][:GLOBAL_ROWS]
    return rearrange(kept, "(n passes) d -> (passes n) d", passes=step)


def _global_rows(
    words: Tensor, positions: Tensor, segment: Tensor | None, bos: int, mask: int | None, stride: int, seed: int
) -> Tensor:
    """The embeddings (512, width) of the global tokens: BOS and MASK, plus positions; random if ``mask`` is None."""
    generator = torch.Generator().manual_seed(seed)
    table = words.float().cpu()
    rows = _normal_samples(table, generator) if mask is None else table[mask].repeat(GLOBAL_ROWS, 1)
    rows[0] = table[bos]
    rows = rows + spread_positions(positions.float().cpu(), stride, generator)
    return (rows if segment is None else rows + segment.float().cpu()).to(words)


def _normal_samples(table: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (512, d_model) from a normal distribution with the mean and covariance of the rows of ``table``."""
    table64 = table.double()
    variances, directions = torch.linalg.eigh(torch.cov(table64.T))
    factor = directions * variances.clamp(min=0).sqrt()  # factor @ factor.T is the covariance, which may be singular
    drawn = torch.randn(GLOBAL_ROWS, table.shape[1], dtype=torch.float64, generator=generator)
    samples: Tensor = table64.mean(dim=0) + drawn @ factor.T
    return samples.to(table.dtype)


def _special_ids(config: Any, tokenizer: Any, mask_needed: bool) -> tuple[int, int | None]:
    """The ids of BOS, from the tokenizer or else the configuration, and of MASK, which only the tokenizer has.

    Without BOS, a Pegasus starts its decoder with the padding, which its configuration names.
    """
    ids = [getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")]
    ids += [getattr(config, name, None) for name in ("bos_token_id", "decoder_start_token_id")]
    bos = next((i for i in ids if i is not None), None)
    mask = getattr(tokenizer, "mask_token_id", None)
    if tokenizer is None or bos is None or (mask_needed and mask is None):
        raise ValueError(
            "tokenizer: expected one with bos_token and mask_token, which initialise the global tokens, got "
            f"{type_name(tokenizer)}; random_global_init=True needs no mask_token"
        )
    return bos, mask


def _load(path: str | Path, architecture: str | None, use_safetensors: bool) -> tuple[Family, Any, type[Any]]:
    """Load a model as the class that ``architecture``, or else its configuration, names; and find its LSG class."""
    check_directory(path)
    config_dict, _ = PretrainedConfig.get_config_dict(path)
    check_named_weights(config_dict)
    names = [architecture] if architecture is not None else (config_dict.get("architectures") or [None])
    family, target_class = _family_and_class(config_dict, names[0], path)
    if architecture is None and issubclass(target_class, LSGSeq2SeqModel):
        target_class = family.default  # the weights that it adds are tied or zero
    config_class = family.config_class
    is_lsg = config_class.is_published(config_dict) or config_dict.get("model_type") == config_class.model_type
    model_class = target_class if is_lsg else target_class.plain_class
    # a new head for spans has two labels, however many the directory's own head has
    labels = {"num_labels": 2} if (architecture or "").endswith("ForQuestionAnswering") else {}
    try:
        model, info = load_weights(
            model_class.from_pretrained,
            path,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **SAVED_DTYPE,
            **labels,
        )
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model_or_path: cannot load {path} as a {model_class.__name__}: {reason}") from error
    states, missing = model.state_dict(), set(info["missing_keys"])
    loaded = {states[name].data_ptr() for name in states if name not in missing}
    absent = sorted(name for name in missing if states[name].data_ptr() not in loaded)
    if family.sinusoidal:
        absent = [name for name in absent if not name.endswith(family.tables.positions)]  # computed
    of_base = f"{model.base_model_prefix}."
    new = [name for name in absent if not name.startswith(of_base) or name.startswith(f"{of_base}pooler")]
    if architecture is None or len(new) < len(absent):
        if absent:
            raise ValueError(
                f"model_or_path: expected all weights of a {model_class.__name__} at {path}, got none for {absent}"
            )
    elif new:
        warnings.warn(f"architecture: {path} has no weights for {new}; they are drawn at random", stacklevel=3)
    return family, model, target_class


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a name or directory.

    The vocabulary's file is looked for first: if it is missing, some versions of AutoTokenizer return an empty
    tokenizer instead of failing.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: there is no tokenizer.
    """
    check_directory(path)
    if not any(has_file(path, name) for name in _VOCABULARIES):
        raise ValueError(
            f"tokenizer: expected one at {path}, which has none of {', '.join(_VOCABULARIES)}; convert takes another "
            "one as tokenizer, lsg-attn convert as --tokenizer"
        )
    return AutoTokenizer.from_pretrained(path)


def _family_and_class(config: Any, name: str | None, path: Any = None) -> tuple[Family, type[Any]]:
    """The family of a configuration, and the LSG class for the name of a plain or an LSG class; None: the default."""
    family = family_of(config)
    if family is None:
        titles = ", ".join(family.title for family in FAMILIES)
        model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
        raise ValueError(
            f"model_or_path: expected one of {titles}, or its LSG model, got model_type {model_type!r}"
            + ("" if path is None else f" at {path}")
            + ("; is there a config.json?" if model_type is None else "; use_lsg gives other encoders LSG attention")
        )
    if name is None:
        return family, family.default
    for cls in family.convertible:
        if name in (cls.__name__, cls.plain_class.__name__):
            return family, cls
    expected = ", ".join(cls.plain_class.__name__ for cls in family.convertible)
    raise ValueError(f"model_or_path: expected one of {expected}, or its LSG class, got {name}")


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Make the buffers that no checkpoint holds: positions count up, segments are 0."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                values = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module._buffers[name] = torch.zeros_like(values) if name == "token_type_ids" else values
