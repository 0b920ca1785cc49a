"""Which files of a checkpoint are read: safetensors, and a pickle only for a caller who asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, has_file

_SAFE = ".safetensors"
_ABOUT_THE_HUB = ("cache_dir", "proxies", "token", "revision", "local_files_only")
# of cached_file, which then finds what from_pretrained finds
_NONE_IF_MISSING = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def load_weights(load: Callable[..., Any], path: Any, *args: Any, use_safetensors: bool | None, **kwargs: Any) -> Any:
    """Call transformers' ``from_pretrained`` so that it reads no pickle, unless ``use_safetensors`` is False.

    Args:
        load: is called as ``load(path, *args, use_safetensors=use_safetensors, **kwargs)``.
        path: the name or directory of a checkpoint, or None for a ``state_dict`` in memory.
        use_safetensors: None means True. False means pickles alone, which transformers reads with
            ``torch.load(weights_only=True)``.

    Raises:
        OSError: as in transformers; or the weights are a pickle, which the error names; or the directory is not there.
    """
    if path is not None:
        check_directory(path)
    if use_safetensors is False or path is None:
        return load(path, *args, use_safetensors=use_safetensors, **kwargs)
    subfolder, variant = kwargs.get("subfolder") or "", kwargs.get("variant")
    hub = {key: kwargs[key] for key in _ABOUT_THE_HUB if kwargs.get(key) is not None}

    def has_any(*names: str) -> str | None:
        for name in (_name(name, subfolder, variant) for name in names):
            with suppress(OSError, ValueError):  # no such repository, or no network: transformers will say so
                if has_file(path, name, **hub):
                    return name
        return None

    # whatever a path or an index names, transformers reads
    file = os.path.join(subfolder, path)
    is_url = urlparse(str(path)).scheme in ("http", "https")
    if is_url or (os.path.isfile(file) and not file.endswith(_SAFE)):
        raise _refusal(path, f"{os.path.basename(file)}, which would be read as a pickle")
    index = None
    with suppress(OSError, ValueError):  # as above
        index = cached_file(path, _name(SAFE_WEIGHTS_INDEX_NAME, subfolder, variant), **hub, **_NONE_IF_MISSING)
    if index is not None:
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        if odd := [shard for shard in shards if not shard.endswith(_SAFE)]:
            raise _refusal(path, f"{odd[0]}, which would be read as a pickle")
    try:
        return load(path, *args, use_safetensors=True, **kwargs)
    except OSError as error:
        if has_any(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) or not (
            found := has_any(WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        ):
            raise
        raise _refusal(path, f"{found}, a pickle") from error


def check_directory(path: str | Path) -> None:
    """Check that a path that cannot be a name on the Hub exists. transformers says that the name is malformed.

    Raises:
        FileNotFoundError: it does not.
    """
    text = str(path)
    is_path = text.startswith((".", "~", os.sep)) or (text.count("/") > 1 and "://" not in text)
    if is_path and not os.path.exists(text):
        raise FileNotFoundError(f"expected the name of a model or its directory, got {text}, which does not exist")


def check_named_weights(config_dict: dict[str, Any]) -> None:
    """Check the file of weights that the contents of a ``config.json`` name, if any.

    Raises:
        ValueError: it is not a safetensors file.
    """
    name = config_dict.get("transformers_weights")
    if name is not None and not str(name).endswith(_SAFE):
        raise ValueError(f"transformers_weights: expected a file *{_SAFE}, got {name!r}")


def _name(name: str, subfolder: str, variant: str | None) -> str:
    """A file's name as transformers makes it: ``model.fp16.safetensors`` for the variant fp16."""
    stem, _, suffix = name.rpartition(".")
    return os.path.join(subfolder, name if variant is None else f"{stem}.{variant}.{suffix}")


def _refusal(path: Any, found: str) -> OSError:
    return OSError(
        f"expected weights in safetensors at {path}, found {found}; if you trust its source, pass "
        "use_safetensors=False (lsg-attn convert: --no-use-safetensors)"
    )
