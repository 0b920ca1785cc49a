"""Documents with their summaries, from a file of JSON lines, for the examples that train and evaluate summarizers."""

from __future__ import annotations

import json
from pathlib import Path


def read_pairs(path: Path, document: str = "document", summary: str = "summary") -> list[tuple[str, str]]:
    """The strings under two keys of each line's object. Blank lines are skipped.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        ValueError: a line lacks one of the two strings (the error gives its number), or there are no lines.
    """
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError:
                example = None
            found = [example.get(key) for key in (document, summary)] if isinstance(example, dict) else []
            if not found or not all(isinstance(text, str) for text in found):
                raise ValueError(
                    f'{path}:{number}: expected an object with the strings "{document}" and "{summary}", '
                    f"got {line.strip()[:80]}"
                )
            pairs.append((found[0], found[1]))
    if not pairs:
        raise ValueError(f"{path}: expected at least one example, got none")
    return pairs
