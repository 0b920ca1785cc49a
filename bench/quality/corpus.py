"""The texts: long documents that an installation has, each with a title and late sentences as questions about it.

They come from the documentation inside Python and numpy, so nothing is downloaded. Questions are taken out of the
documents.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

LEAST, MOST = 1024, 2560  # tokens of a document, its questions included
LONGEST_QUESTION = 64  # tokens: in the smallest block, too, so short a text is read as the plain model reads it
LATE_SENTENCES = 6  # of one document, at most
_CHARACTERS = range(60, 301)  # of a late sentence
_FOLDERS_LEFT_OUT = {"site-packages", "test", "idlelib", "lib2to3", "distutils"}  # no documentation, or gone since 3.12


@dataclass(frozen=True)
class Document:
    """A long text without its title and its late sentences, which are the questions about it."""

    name: str
    text: str
    title: str
    late: tuple[str, ...]


def documents(count_tokens: Callable[[str], int], per_source: int) -> list[Document]:
    """The documents of ``LEAST`` to ``MOST`` tokens that have a title and a late sentence, in a stable order.

    Args:
        count_tokens: the number of tokens of a text, with CLS and SEP.
        per_source: how many to take of each source at most: those whose names have the smallest hashes.
    """
    chosen: dict[str, list[str]] = {}
    for source in (_topics, _modules, _functions):
        count = 0
        for name, read in sorted(source(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
            if count < per_source and LEAST <= count_tokens(text := read()) <= MOST:
                chosen[name] = _paragraphs(text)
                count += 1
    often = Counter(x for paragraphs in chosen.values() for x in {x for y in paragraphs for x in _sentences(y)})
    made = (_document(name, paragraphs, often, count_tokens) for name, paragraphs in chosen.items())
    return [document for document in made if document is not None]


def digest(chosen: Sequence[Document]) -> str:
    """A hash of all that is read and asked."""
    return hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]


def _document(
    name: str, paragraphs: list[str], often: Counter[str], count_tokens: Callable[[str], int]
) -> Document | None:
    """A document without its questions; None if its title or every late sentence is too long or another's, too."""
    title, start, seen = _sentences(paragraphs[0])[0], 2 * sum(map(len, paragraphs)) / 3, 0
    late: list[str] = []
    for paragraph in paragraphs:
        if seen >= start and _is_prose(paragraph):
            late += [x for x in _sentences(paragraph) if len(x) in _CHARACTERS and x.endswith(".")]
        seen += len(paragraph)
    late = [x for x in late if often[x] == 1 and x != title and count_tokens(x) <= LONGEST_QUESTION]
    late = sorted(late, key=len, reverse=True)[:LATE_SENTENCES]
    if not late or often[title] != 1 or count_tokens(title) > LONGEST_QUESTION:
        return None
    text = "\n".join(paragraphs)
    for question in (title, *late):
        text = text.replace(question, " ")
    return Document(name, text, title, tuple(late))


Source = Iterator[tuple[str, Callable[[], str]]]  # names, and what reads the texts


def _topics() -> Source:
    """The topics of Python's help, each with its heading first."""
    for name, text in topics.items():
        yield f"help: {name}", partial(str, text)


def _modules() -> Source:
    """The modules in packages of the standard library.

    ``examples/tune_globals.py`` trains on the modules that are in no package.
    """
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"):
        if path.parent.name not in _FOLDERS_LEFT_OUT:
            yield f"module: {path.parent.name}/{path.stem}", partial(_module, path)


def _module(path: Path) -> str:
    """A module's documentation, its own first; nothing if it has none of its own, or cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some files are there to test just this
        return ""
    nodes = [x for x in ast.walk(tree) if isinstance(x, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    strings = [ast.get_docstring(node) for node in (tree, *nodes)]
    return "\n\n".join(x for x in strings if x) if strings[0] else ""


def _functions() -> Source:
    """The documentation of each of numpy's public functions and classes, once if it has several names."""
    seen = set()
    for module in (np, np.linalg, np.fft, np.random, np.ma):
        for name in sorted(module.__all__):
            member = getattr(module, name)
            text = None if inspect.ismodule(member) else inspect.getdoc(member)
            if text and text not in seen:
                seen.add(text)
                without_call = re.sub(r"\A\w+\(.*?\n\n", "", text, flags=re.DOTALL)
                yield f"numpy: {module.__name__}.{name}", partial(str, without_call)


def _paragraphs(text: str) -> list[str]:
    """A text's paragraphs, each on one line, without the lines under headings; a tokenizer of words needs no more."""
    lines = re.sub(r"^[*=~-]{3,}$", "", text, flags=re.MULTILINE)
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", lines) if paragraph.strip()]


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences rather than code, a list or a table."""
    return paragraph[:1].isupper() and not re.search(r">>>|::|---|[{}|=<>\\]", paragraph)
