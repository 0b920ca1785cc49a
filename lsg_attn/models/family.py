"""Family: what tells one family of models from another, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GLOBAL_ROWS = 512  # rows of the global embeddings in every checkpoint; a model uses the first G


@dataclass(frozen=True)
class Tables:
    """Names of the base model's embeddings in its state dict.

    Attributes:
        words: the token embeddings.
        global_tokens: the 512 rows that global tokens start from.
        positions: one table, or the encoder's and the decoder's.
        token_types: the embeddings of segments; None if there are none.
    """

    words: str
    global_tokens: str
    positions: tuple[str, ...]
    token_types: str | None = None


@dataclass(frozen=True)
class Family:
    """What registration and conversion ask of a family.

    Attributes:
        config_class: the LSG configuration; its ``plain_class`` is transformers' own.
        models: the LSG model classes, the base model first; each has transformers' own as its ``plain_class``.
        default: the class that a directory is converted to if it names none.
        tables: where the base model keeps its embeddings.
        position_offset: the number of rows of the position table before position 0.
        counts_padding: whether that number is ``pad_token_id + 1`` instead, and part of
            ``config.max_position_embeddings``.
        sinusoidal: whether positions are computed, as sines and cosines, and not learned.
        adds_token_type: whether a conversion adds segment 0 to the global tokens unless it is told otherwise.
    """

    config_class: type[Any]
    models: tuple[type[Any], ...]
    default: type[Any]
    tables: Tables
    position_offset: int = 0
    counts_padding: bool = False
    sinusoidal: bool = False
    adds_token_type: bool = False

    @property
    def title(self) -> str:
        """The family's name, as messages give it."""
        name: str = self.config_class.title
        return name

    @property
    def model_type(self) -> str:
        """The plain model's type in ``config.json``."""
        name: str = self.config_class.plain_class.model_type
        return name

    @property
    def convertible(self) -> tuple[type[Any], ...]:
        """The LSG classes with global tokens: all except a decoder alone."""
        return tuple(cls for cls in self.models if cls.has_global_tokens)

    def offset(self, config: Any) -> int:
        """The number of rows of the position table before position 0."""
        return config.pad_token_id + 1 if self.counts_padding else self.position_offset

    def config_length(self, max_length: int, config: Any) -> int:
        """``config.max_position_embeddings`` of a model for documents of ``max_length`` tokens."""
        return max_length + (self.offset(config) if self.counts_padding else 0)
