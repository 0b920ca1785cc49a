"""The conversions that are measured: every type, block size and factor, then other ways to treat the first tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lsg_attn import SPARSITY_TYPES, LSGPattern

LENGTH = 4096  # tokens that a converted model reads
BLOCKS, FACTORS = (128, 64, 256, 32), (2, 4, 8, 16)  # the default first
TYPES = tuple(name for name in SPARSITY_TYPES if name != "none")


@dataclass(frozen=True)
class Setting:
    """A conversion. The sparse block has the size of the block."""

    sparsity_type: str
    block_size: int
    sparsity_factor: int = 0  # of "none"
    num_global_tokens: int = 1
    mask_first_token: bool = True
    plain_questions: bool = False  # whether the plain model reads the questions

    @property
    def label(self) -> str:
        """The name of its row."""
        if self.block_size >= LENGTH:
            return "dense attention"
        sizes = f"{self.block_size} f{self.sparsity_factor}" if self.sparsity_factor else f"{self.block_size}"
        parts = [f"{self.sparsity_type} {sizes}"]
        parts += [f"{self.num_global_tokens} global tokens"] * (self.num_global_tokens > 1)
        parts += ["first token kept"] * (not self.mask_first_token)
        return ", ".join([*parts, *["plain questions"] * self.plain_questions])

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the converted model's configuration."""
        keys = asdict(self)
        del keys["plain_questions"]
        return {**keys, "sparse_block_size": self.block_size}

    @property
    def pattern(self) -> LSGPattern:
        """What its queries see.

        Raises:
            ValueError: there is no such pattern.
        """
        return LSGPattern(**{key: value for key, value in self.keys.items() if key != "mask_first_token"})

    def is_plain(self, tokens: int) -> bool:
        """Whether a text of so many tokens is read exactly as the plain model reads it."""
        return self.num_global_tokens == 1 and self.mask_first_token and self.pattern.is_dense(tokens)


DENSE = Setting("none", LENGTH)  # every token sees every other: what repeated positions alone cost


def grid() -> list[Setting]:
    """Every type with every block size and factor that it takes, and ``none`` with every block size."""
    every = [Setting(name, block, factor) for block in BLOCKS for factor in FACTORS for name in TYPES]
    return [*filter(_is_possible, every), *(Setting("none", block) for block in BLOCKS)]


def settings() -> list[Setting]:
    """All: dense attention, the first token kept, more global tokens, the grid.

    Eight global tokens are there beside the eight that ``examples/tune_globals.py`` trains.

    With its first token kept, a model has the embedding of CLS twice, as token and as global token. It is the default.
    """
    block, factor = BLOCKS[0], FACTORS[0]
    kept = [Setting(name, block, factor, mask_first_token=False) for name in TYPES]
    more = [Setting("norm", block, factor, count, masked) for count in (7, 16) for masked in (True, False)]
    more += [Setting("norm", block, factor, count, False, plain_questions=True) for count in (7, 8, 16)]
    kept.append(Setting("none", block, mask_first_token=False))
    return [DENSE, *kept, *more, *grid()]


def _is_possible(setting: Setting) -> bool:
    try:
        return bool(setting.pattern)
    except ValueError:
        return False
