"""Pages: one HTML file with its data inside, made of a template in pages/, and what a file's suffix asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "pages"


def is_page(path: Path) -> bool:
    """Whether a file is to be a page, and not a picture.

    Raises:
        ValueError: its name ends neither in ``.html`` nor in ``.png``.
    """
    suffix = path.suffix.lower()
    if suffix not in (".html", ".png"):
        raise ValueError(f"--out: expected a file that ends in .png or .html, got {path}")
    return suffix == ".html"


def write_page(path: Path, template: str, data: dict[str, Any]) -> None:
    """Write the page of a template with ``data``, which its script reads.

    Raises:
        OSError: the file cannot be written.
    """
    page = (_TEMPLATES / template).read_text(encoding="utf-8")
    # without a "<", no text of a document ends the script or begins a comment
    inside = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(page.replace("{{ data }}", inside), encoding="utf-8")
