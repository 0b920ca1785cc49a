"""The document that the demos read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Document(NamedTuple):
    """A text and where it comes from."""

    source: str
    text: str


def read_document(file: Path | None) -> Document:
    """Read a text file in UTF-8, or by default the language reference that Python ships for its interactive help.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8.
    """
    if file is not None:
        try:
            return Document(str(file), file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected a text in UTF-8, got {error}") from error
    from pydoc_data.topics import topics

    return Document("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))
