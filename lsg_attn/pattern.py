"""LSGPattern: the parameters of the attention pattern, their validation, and the windows that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import integer, type_name
from .sparsity import RULES, CompressionRule

if TYPE_CHECKING:
    from typing import TypeVar

    from torch import Tensor

    Blocks = TypeVar("Blocks", int, Tensor)  # the index of a block, or of many

SPARSITY_TYPES = ("norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh", "none")


@dataclass(frozen=True)
class LSGPattern:
    """The keys that each query attends to in Local + Sparse + Global attention (arXiv 2210.15497).

    A sequence consists of G global tokens followed by T other tokens, which are split into blocks of B. The queries of
    block ``i`` see, in one softmax, the G global keys, the tokens of blocks ``i-1, i, i+1``, and on each side of these
    blocks the nearest ``sparse_block_size`` compressed keys. Global queries see all tokens. If ``T <= 2B``, all
    queries see all tokens.

    A causal pattern leaves out all that lies to the right. The query of token ``t`` in block ``i`` sees the G global
    keys, the compressed keys to its left, block ``i-1``, and block ``i`` up to ``t``; if ``T <= 2B``, all tokens up to
    ``t``. Global queries see the global keys alone, so that no token reaches an earlier one through them.

    Args:
        block_size: B, the number of queries in a block; at least 1. T need not be a multiple of B.
        sparse_block_size: s, the number of compressed keys on each side. 0 turns the sparse part off. For ``norm`` and
            ``lsh``, min(B, s) must divide B and be a multiple of f.
        sparsity_factor: f, the number of tokens for each compressed key; must divide B. 0 turns the sparse part off.
            With 1, the compressed keys are the tokens themselves.
        sparsity_type: how tokens become compressed keys, one of ``SPARSITY_TYPES``.
        num_global_tokens: G, the number of global tokens, which come first in the sequence.
        lsh_num_pre_rounds: hashing rounds before the last one (``lsh`` only).
        lsh_seed: seed of the random directions (``lsh`` only).
        causal: whether a token sees no later token.

    Raises:
        TypeError: a number is not an integer, ``sparsity_type`` is not a string, or ``causal`` is not a bool.
        ValueError: a number is out of range, ``sparsity_type`` is unknown, or the sizes are not multiples as required.
    """

    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str = "norm"
    num_global_tokens: int = 1
    lsh_num_pre_rounds: int = 1
    lsh_seed: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        for name, least in _MINIMUM.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        if self.lsh_seed >= 1 << 63:
            raise ValueError(f"lsh_seed: expected an int below 2**63, got {self.lsh_seed}")
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal: expected a bool, got {type_name(self.causal)}")
        name = self.sparsity_type
        if not isinstance(name, str):
            raise TypeError(f"sparsity_type: expected a str, got {type_name(name)}")
        if name not in SPARSITY_TYPES:
            raise ValueError(f"sparsity_type: expected one of {SPARSITY_TYPES}, got {name!r}")
        if not self.has_sparse:
            return
        if self.block_size % self.sparsity_factor:
            raise ValueError(
                f"sparsity_factor must divide block_size, got sparsity_factor={self.sparsity_factor} "
                f"and block_size={self.block_size}"
            )
        if self.rule.is_chunked and (self.chunk % self.sparsity_factor or self.block_size % self.chunk):
            raise ValueError(
                f"sparsity_type={self.sparsity_type!r} compresses chunks of min(block_size, sparse_block_size) tokens, "
                f"which must be a multiple of sparsity_factor and divide block_size; got chunks of {self.chunk}, "
                f"sparsity_factor={self.sparsity_factor}, block_size={self.block_size}"
            )

    @property
    def has_sparse(self) -> bool:
        """Whether queries see compressed keys at all."""
        return self.sparsity_type != "none" and self.sparse_block_size > 0 and self.sparsity_factor > 0

    @property
    def compression(self) -> str:
        """The compression that takes place: a sparsity type, ``"none"``, or ``"identity"`` if f is 1."""
        if not self.has_sparse:
            return "none"
        if self.sparsity_factor == 1:
            return "identity"
        if self.sparsity_type == "lsh" and self.sparsity_factor == self.sparse_block_size:
            return "bos_pooling"  # one cluster per chunk: the original pools by the first query instead of hashing
        return self.sparsity_type

    @property
    def rule(self) -> CompressionRule:
        """What the compression that is really done asks of the rest of the code."""
        return RULES[self.compression]

    @property
    def step(self) -> int:
        """The number of compressed keys per block: B // f, or 0 without a sparse part."""
        return self.block_size // self.sparsity_factor if self.has_sparse else 0

    @property
    def chunk(self) -> int:
        """The number of tokens that ``norm`` and ``lsh`` compress together: min(B, s)."""
        return min(self.block_size, self.sparse_block_size)

    @property
    def lsh_buckets(self) -> tuple[int, ...]:
        """The number of buckets in each hashing round, in order. A round has ``buckets // 2`` random directions."""
        if not self.rule.is_hashed:
            return ()
        return (self.chunk,) * self.lsh_num_pre_rounds + (self.chunk // self.sparsity_factor,)

    def is_dense(self, num_tokens: int) -> bool:
        """Whether all tokens see each other (if causal: all earlier ones). So it is for T = ``num_tokens`` <= 2B."""
        return num_tokens <= 2 * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """The number of blocks of T tokens. The last block may be partly filled."""
        return -(-num_tokens // self.block_size)

    def num_slots(self, num_tokens: int) -> int:
        """The number of compressed keys of T tokens: ``step`` per block, or 0 if attention is dense."""
        return 0 if self.is_dense(num_tokens) else self.num_blocks(num_tokens) * self.step

    def reach(self, num_tokens: int) -> int:
        """The most compressed keys that a query of T tokens sees on one side: s, or fewer in a short sequence."""
        return min(self.sparse_block_size, max(self.num_blocks(num_tokens) - 2, 0) * self.step)

    @property
    def halo(self) -> int:
        """How many tokens before a block, and unless the pattern is causal after it, have what its queries see.

        They are whole blocks: one, and those that the nearest s compressed keys farther out are made of.
        """
        return (1 + (-(-self.sparse_block_size // self.step) if self.has_sparse else 0)) * self.block_size

    def local_window(self, block: Blocks) -> tuple[Blocks, Blocks]:
        """The range [start, stop) of tokens that ``block`` sees. It may extend past either end of the sequence.

        ``block`` is an int, or a tensor of them. Token 0 is the first token after the globals. A causal window stops
        with the block itself, of which each query sees only what precedes it.
        """
        return (block - 1) * self.block_size, (block + (1 if self.causal else 2)) * self.block_size

    def sparse_windows(
        self, block: Blocks, reach: int | None = None
    ) -> tuple[tuple[Blocks, Blocks], tuple[Blocks, Blocks]]:
        """The ranges [start, stop) of compressed keys that ``block`` sees to its left and right.

        They may lie past either end of the sequence. The right one is empty if the pattern is causal.

        Args:
            block: the index of the block, an int or a tensor of them.
            reach: the number of compressed keys on each side, by default s. :meth:`reach` gives a smaller number for
                short sequences.
        """
        reach = self.sparse_block_size if reach is None else reach
        left, right = (block - 1) * self.step, (block + 2) * self.step
        return (left - reach, left), (right, right + (0 if self.causal else reach))


_MINIMUM = {
    "block_size": 1,
    "sparse_block_size": 0,
    "sparsity_factor": 0,
    "num_global_tokens": 0,
    "lsh_num_pre_rounds": 0,
    "lsh_seed": 0,
}
