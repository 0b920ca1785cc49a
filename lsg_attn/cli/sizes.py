"""The sizes of BART's encoders and decoders, for the demos and the bench."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The size of a stack of transformer layers."""

    width: int
    layers: int
    heads: int
    feed_forward: int

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.width // self.heads


BART_SIZES = {"base": Size(768, 6, 12, 3072), "large": Size(1024, 12, 16, 4096)}  # arXiv 1910.13461
