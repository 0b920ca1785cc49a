"""Conversion of a whole checkpoint: all or nothing, checked, with a model card."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from .card import model_card
from .conversion import SAVED_DTYPE, convert

CHECKPOINT_STEPS = ("convert", "write", "check")


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    max_length: int = 4096,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    **options: Any,
) -> None:
    """Convert a checkpoint and save the result, with a model card, to a new directory.

    The directory appears only once it is complete and checked. If the conversion fails, it is not created.

    Args:
        source: the name or directory of a model of one of the families, plain or LSG, with its tokenizer.
        destination: the new directory. It must not exist yet.
        on_step: called at the beginning of each step with its name, one of ``CHECKPOINT_STEPS``.
        max_length, **options: as in :func:`lsg_attn.models.convert`.

    Raises:
        FileExistsError: ``destination`` exists.
        OSError: ``destination`` cannot be written, or ``source`` cannot be read.
        RuntimeError: the saved checkpoint, loaded again, differs from the converted model.
        TypeError, ValueError: as in :func:`lsg_attn.models.convert`.
    """
    destination = Path(destination)
    _check_destination(destination)
    on_step("convert")
    model, tokenizer = convert(source, max_length, **options)
    on_step("write")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
        folder = Path(scratch) / destination.name
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # as it reports a full disk
            raise OSError(f"destination: cannot write {destination}: {error}") from error
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, source, destination.name, max_length), encoding="utf-8")
        on_step("check")
        _check(folder, model, max_length)
        folder.rename(destination)


def _check_destination(destination: Path) -> None:
    """Notice before the work that the directory cannot be made.

    Raises:
        OSError: it exists, or a parent is not a directory or cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"destination: expected a directory that does not exist yet, got {destination}")
    parent = next(path for path in destination.absolute().parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"destination: expected a directory at {parent}, got a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"destination: expected a directory that can be written at {parent}")


def _check(folder: Path, model: Any, max_length: int) -> None:
    """Load a saved checkpoint and compare it with the model.

    Raises:
        RuntimeError: they differ.
    """
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **SAVED_DTYPE)
    found, expected = loaded.state_dict(), model.state_dict()
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name].cpu())]
    wrong += [f"{what}: {names}" for what, names in info.items() if names]
    got = AutoTokenizer.from_pretrained(folder).model_max_length
    if got != max_length:
        wrong.append(f"the tokenizer's model_max_length is {got}")
    if wrong:
        raise RuntimeError(f"the saved checkpoint differs from the converted model: {'; '.join(wrong)}")
