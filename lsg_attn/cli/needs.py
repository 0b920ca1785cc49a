"""What a command needs that may not be installed."""

from __future__ import annotations

from importlib.util import find_spec


def need_transformers(what: str) -> None:
    """Check that transformers is there, and keep it from drawing progress bars over ours; ``what`` needs it.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(f"{what} needs transformers: pip install 'lsg-attn[models]'")
    from transformers.utils import logging

    logging.disable_progress_bar()


def need_matplotlib(instead: str) -> None:
    """Check that matplotlib is there for a PNG; ``instead`` says how to do without.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"--out needs matplotlib for a PNG: pip install 'lsg-attn[plot]', or {instead}")
