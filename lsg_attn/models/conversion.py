"""Conversion of a BART to an LSG-BART for longer documents, and of an LSG-BART to another length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from einops import rearrange, repeat
from packaging.version import Version
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
    BartPreTrainedModel,
    PretrainedConfig,
)
from transformers.utils.hub import has_file

from ..checks import integer, type_name
from .bart import (
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
    LSGBartPreTrainedModel,
)
from .configuration import GLOBAL_ROWS, LSG_KEYS, LSGBartConfig, is_published_lsg

CHECKPOINT_STEPS = ("convert", "write", "check")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model")
_OFFSET = 2  # BART's position embeddings have this many unused rows before position 0
_CLASSES: dict[type[Any], type[Any]] = {
    BartModel: LSGBartModel,
    BartForConditionalGeneration: LSGBartForConditionalGeneration,
    BartForQuestionAnswering: LSGBartForQuestionAnswering,
    BartForSequenceClassification: LSGBartForSequenceClassification,
}
# Load in the dtype of the checkpoint, as transformers 5 does by default.
_SAVED_DTYPE = {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": "auto"}


class Converted(NamedTuple):
    """The result of :func:`convert`."""

    model: LSGBartPreTrainedModel
    tokenizer: Any


def convert(
    model_or_path: BartPreTrainedModel | str | Path,
    max_length: int = 4096,
    *,
    tokenizer: Any = None,
    random_global_init: bool = False,
    keep_first_global_token: bool = False,
    global_positional_stride: int = 64,
    seed: int = 0,
    **lsg_keys: Any,
) -> Converted:
    """Convert a BART to an LSG-BART for ``max_length`` tokens, without training (arXiv 2210.15497).

    The position embeddings of the encoder and the decoder are repeated, or cut, to ``max_length``. The first global
    token is the embedding of BOS plus a position embedding. Each other global token is the embedding of MASK plus a
    different position embedding. If the source is an LSG-BART, it keeps its global tokens unless
    ``keep_first_global_token`` is true. The source itself is not modified.

    A directory with the architecture BartModel, such as facebook/bart-base, is converted with the language-modeling
    head. BART was pretrained with this head, and its weights are the token embeddings.

    Args:
        model_or_path: a BART or LSG-BART with an encoder, or its name or directory.
        max_length: the number of tokens in the longest document, at least 1.
        tokenizer: the model's tokenizer, which gives the ids of BOS and MASK. By default it is loaded from the path.
        random_global_init: whether to draw the global tokens, except the first, from a normal distribution with the
            mean and covariance of the token embeddings, instead of using MASK.
        keep_first_global_token: for an LSG-BART, whether to keep the first global token and compute all others
            anew.
        global_positional_stride: the distance in positions between most neighbouring global tokens.
        seed: the seed of all random numbers. They are used for ``random_global_init``, and for the positions of the
            global tokens if the source has fewer than 512 positions.
        **lsg_keys: the encoder's keys of :class:`LSGBartConfig`, such as ``num_global_tokens``.

    Returns:
        ``model``: an LSG-BART with the source's head, dtype, device and attention implementations.
        ``tokenizer``: a copy of the tokenizer with ``model_max_length=max_length``, or None if ``model_or_path`` is a
        model and no tokenizer is given.

    Raises:
        TypeError: an argument is not of the type named above, or a key is not one of the encoder's keys.
        ValueError: the source is not a BART with an encoder, or it lacks weights; the tokenizer is missing or has no
            BOS or MASK; a number is out of range; or keys contradict each other.
    """
    max_length = integer("max_length", max_length, 1)
    seed = integer("seed", seed, 0)
    if unknown := set(lsg_keys) - set(LSG_KEYS):
        raise TypeError(f"convert: expected keys out of {LSG_KEYS}, got {', '.join(sorted(unknown))}")
    if isinstance(model_or_path, BartPreTrainedModel):
        source = model_or_path
    elif isinstance(model_or_path, (str, Path)):
        source = _load(model_or_path)
        tokenizer = load_tokenizer(model_or_path) if tokenizer is None else tokenizer
    else:
        raise TypeError(f"model_or_path: expected a BART, a name or a directory, got {type_name(model_or_path)}")
    target_class, is_lsg = _target_class(type(source)), isinstance(source, LSGBartPreTrainedModel)
    if is_lsg:  # to_dict() has neither this key nor attn_implementation
        lsg_keys.setdefault("attention_implementation", source.config.attention_implementation)
    config = LSGBartConfig.from_dict(
        {key: value for key, value in source.config.to_dict().items() if key != "auto_map"},  # it names code for BART
        **lsg_keys,
        max_position_embeddings=max_length,
        attn_implementation=source.config._attn_implementation,
    )

    if keep_first_global_token and not is_lsg:
        raise ValueError("keep_first_global_token: expected False for a BART without global tokens, got True")
    if random_global_init and is_lsg and not keep_first_global_token:
        raise ValueError(
            "random_global_init: expected False for an LSG-BART without keep_first_global_token, got True; its global "
            "tokens are kept"
        )
    base = source.base_model
    states = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    prefix = "" if base is source else f"{source.base_model_prefix}."
    if keep_first_global_token or not is_lsg:
        name = f"{prefix}encoder.global_embeddings.weight"
        bos, mask = _special_ids(config, tokenizer, mask_needed=not random_global_init)
        rows = _global_rows(base, bos, None if random_global_init else mask, global_positional_stride, seed)
        states[name] = torch.cat([states[name][:1], rows[1:]]) if is_lsg else rows
    for part in ("encoder", "decoder"):
        name = f"{prefix}{part}.embed_positions.weight"
        states[name] = repeat_positions(states[name], max_length)

    with torch.device("meta"):  # every tensor must come from the source, so none is initialised here
        model = target_class(config)
    model.load_state_dict(states, assign=True)
    model.tie_weights()
    if model.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = max_length
    return Converted(model.train(source.training), tokenizer)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    max_length: int = 4096,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    **options: Any,
) -> None:
    """Convert a checkpoint and save the result to a new directory.

    The directory appears only once it is complete and checked. If the conversion fails, it is not created.

    Args:
        source: the name or directory of a BART or LSG-BART with its tokenizer.
        destination: the new directory. It must not exist yet.
        on_step: called at the beginning of each step with its name, one of ``CHECKPOINT_STEPS``.
        max_length, **options: as in :func:`convert`.

    Raises:
        FileExistsError: ``destination`` exists.
        RuntimeError: the saved checkpoint, loaded again, differs from the converted model.
        TypeError, ValueError: as in :func:`convert`.
    """
    destination = Path(destination)
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"destination: expected a directory that does not exist yet, got {destination}")
    on_step("convert")
    model, tokenizer = convert(source, max_length, **options)
    on_step("write")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
        folder = Path(scratch) / destination.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        on_step("check")
        _check(folder, model, max_length)
        folder.rename(destination)


def repeat_positions(weight: Tensor, length: int) -> Tensor:
    """Extend BART's position embeddings (2 + n, d_model) to (2 + length, d_model).

    The first two rows are not positions and are not repeated.
    """
    offset, rows = weight[:_OFFSET], weight[_OFFSET:]
    copies = -(-length // len(rows))
    return torch.cat([offset, repeat(rows, "n d -> (copies n) d", copies=copies)[:length]])


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


def _global_rows(base: BartModel, bos: int, mask: int | None, stride: int, seed: int) -> Tensor:
    """The embeddings (512, d_model) of the global tokens: BOS and MASK, plus positions; random if ``mask`` is None."""
    generator = torch.Generator().manual_seed(seed)
    table = base.shared.weight.detach().float().cpu()
    rows = _normal_samples(table, generator) if mask is None else table[mask].repeat(GLOBAL_ROWS, 1)
    rows[0] = table[bos]
    positions = base.encoder.embed_positions.weight.detach().float().cpu()[_OFFSET:]
    return (rows + spread_positions(positions, stride, generator)).to(base.shared.weight)


def _normal_samples(table: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (512, d_model) from a normal distribution with the mean and covariance of the rows of ``table``."""
    table64 = table.double()
    variances, directions = torch.linalg.eigh(torch.cov(table64.T))
    factor = directions * variances.clamp(min=0).sqrt()  # factor @ factor.T is the covariance, which may be singular
    drawn = torch.randn(GLOBAL_ROWS, table.shape[1], dtype=torch.float64, generator=generator)
    samples: Tensor = table64.mean(dim=0) + drawn @ factor.T
    return samples.to(table.dtype)


def _special_ids(config: LSGBartConfig, tokenizer: Any, mask_needed: bool) -> tuple[int, int | None]:
    """The ids of BOS, from the tokenizer or else the configuration, and of MASK, which only the tokenizer has."""
    ids = [getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")] + [config.bos_token_id]
    bos = next((i for i in ids if i is not None), None)
    mask = getattr(tokenizer, "mask_token_id", None)
    if bos is None or (mask_needed and mask is None):
        raise ValueError(
            "tokenizer: expected one with bos_token and mask_token, which initialise the global tokens, got "
            f"{type_name(tokenizer)}; random_global_init=True needs no mask_token"
        )
    return bos, mask


def _load(path: str | Path) -> BartPreTrainedModel:
    """Load a model as the class that its configuration names."""
    config_dict, _ = PretrainedConfig.get_config_dict(path)
    is_lsg = is_published_lsg(config_dict) or config_dict.get("model_type") == LSGBartConfig.model_type
    if not is_lsg and config_dict.get("model_type") != "bart":
        raise ValueError(
            f"model_or_path: expected a BART or LSG-BART, got model_type {config_dict.get('model_type')!r} at {path}; "
            "mBART, Pegasus and others are not supported yet"
        )
    (name,) = (config_dict.get("architectures") or [BartModel.__name__])[:1]
    by_name = {cls.__name__: cls for pair in _CLASSES.items() for cls in pair}
    target_class = _target_class(by_name.get(name, name))
    if target_class is LSGBartModel:
        target_class = LSGBartForConditionalGeneration  # the weights that it adds are tied or zero
    (plain_class,) = (plain for plain, lsg in _CLASSES.items() if lsg is target_class)
    model_class = target_class if is_lsg else plain_class
    model, info = model_class.from_pretrained(path, output_loading_info=True, **_SAVED_DTYPE)
    states, missing = model.state_dict(), set(info["missing_keys"])
    loaded = {states[name].data_ptr() for name in states if name not in missing}
    if absent := sorted(name for name in missing if states[name].data_ptr() not in loaded):
        raise ValueError(
            f"model_or_path: expected all weights of a {model_class.__name__} at {path}, got none for {absent}"
        )
    return model


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a name or directory.

    The vocabulary's file is looked for first: if it is missing, some versions of AutoTokenizer return an empty
    tokenizer instead of failing.

    Raises:
        ValueError: there is no tokenizer.
    """
    if not any(has_file(path, name) for name in _VOCABULARIES):
        raise ValueError(f"tokenizer: expected one at {path}, which has none of {', '.join(_VOCABULARIES)}")
    return AutoTokenizer.from_pretrained(path)


def _target_class(source: type | str) -> type[LSGBartPreTrainedModel]:
    """The LSG class for a BART or LSG-BART class. A string names a class that has no LSG class, for the error."""
    for plain, lsg in _CLASSES.items():
        if source in (plain, lsg):
            return lsg
    expected = ", ".join(cls.__name__ for cls in _CLASSES)
    got = source if isinstance(source, str) else source.__name__
    raise ValueError(f"model_or_path: expected one of {expected}, or its LSG class, got {got}")


def _check(folder: Path, model: LSGBartPreTrainedModel, max_length: int) -> None:
    """Load a saved checkpoint and compare it with the model.

    Raises:
        RuntimeError: they differ.
    """
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **_SAVED_DTYPE)
    found, expected = loaded.state_dict(), model.state_dict()
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name].cpu())]
    wrong += [f"{what}: {names}" for what, names in info.items() if names]
    got = AutoTokenizer.from_pretrained(folder).model_max_length
    if got != max_length:
        wrong.append(f"the tokenizer's model_max_length is {got}")
    if wrong:
        raise RuntimeError(f"the saved checkpoint differs from the converted model: {'; '.join(wrong)}")
