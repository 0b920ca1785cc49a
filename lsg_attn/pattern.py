"""LSGPattern: the parameters of the attention pattern, their validation, and the only home of its windows."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import integer, type_name

SPARSITY_TYPES = ("norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh", "none")


@dataclass(frozen=True)
class LSGPattern:
    """Who sees whom in Local + Sparse + Global attention (arXiv 2210.15497).

    A sequence is G global tokens followed by T others, cut into blocks of B. Queries of block ``i`` see, in one
    softmax: the G global keys; the tokens of blocks ``i-1, i, i+1``; and ``sparse_block_size`` compressed keys on
    each side, just outside those blocks. Global queries, and every query when ``T <= 2B``, see all tokens.

    Args:
        block_size: B, queries in a block; at least 1. T need not be a multiple.
        sparse_block_size: s, compressed keys seen on each side. 0 turns the sparse part off. For ``norm`` and ``lsh``
            min(B, s) must divide B and be a multiple of f.
        sparsity_factor: f, tokens that one compressed key stands for; divides B. 0 turns the sparse part off,
            1 takes the tokens themselves.
        sparsity_type: how tokens become compressed keys, one of ``SPARSITY_TYPES``.
        num_global_tokens: G, the first positions of the sequence.
        lsh_num_pre_rounds: hashing rounds before the last one (``lsh`` only).
        lsh_seed: seed of the random directions (``lsh`` only).

    Raises:
        TypeError: a number is not an integer, or ``sparsity_type`` is not a string.
        ValueError: a number is out of range, a type is unknown, or sizes do not divide.
    """

    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str = "norm"
    num_global_tokens: int = 1
    lsh_num_pre_rounds: int = 1
    lsh_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        if self.lsh_seed >= 1 << 63:
            raise ValueError(f"lsh_seed: expected an int below 2**63, got {self.lsh_seed}")
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
        if self.compression in ("norm", "lsh") and (self.chunk % self.sparsity_factor or self.block_size % self.chunk):
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
        """The compression that is really done: a sparsity type, ``"none"``, or ``"identity"`` where f is 1."""
        if not self.has_sparse:
            return "none"
        if self.sparsity_factor == 1:
            return "identity"
        if self.sparsity_type == "lsh" and self.sparsity_factor == self.sparse_block_size:
            return "bos_pooling"  # one cluster a chunk: the original pools by the first query instead of hashing
        return self.sparsity_type

    @property
    def step(self) -> int:
        """Compressed keys of one block, B // f."""
        return self.block_size // self.sparsity_factor if self.has_sparse else 0

    @property
    def chunk(self) -> int:
        """Tokens among which ``norm`` and ``lsh`` choose, min(B, s)."""
        return min(self.block_size, self.sparse_block_size)

    @property
    def lsh_buckets(self) -> tuple[int, ...]:
        """Buckets of each hashing round in order; a round has ``buckets // 2`` random directions."""
        if self.compression != "lsh":
            return ()
        return (self.chunk,) * self.lsh_num_pre_rounds + (self.chunk // self.sparsity_factor,)

    def is_dense(self, num_tokens: int) -> bool:
        """Whether ``num_tokens`` = T tokens after the globals all see each other (T <= 2B)."""
        return num_tokens <= 2 * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that T tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def num_slots(self, num_tokens: int) -> int:
        """Compressed keys made from T tokens: ``step`` for each block; none where attention is dense."""
        return 0 if self.is_dense(num_tokens) else self.num_blocks(num_tokens) * self.step

    def reach(self, num_tokens: int) -> int:
        """Compressed keys on each side that any query of T tokens can see: s, or fewer in a short sequence."""
        return min(self.sparse_block_size, max(self.num_blocks(num_tokens) - 2, 0) * self.step)

    def local_window(self, block: int) -> tuple[int, int]:
        """Tokens [start, stop) after the globals that ``block`` sees; may reach past either end of the sequence."""
        return (block - 1) * self.block_size, (block + 2) * self.block_size

    def sparse_windows(self, block: int, reach: int | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
        """Slots [start, stop) that ``block`` sees to its left and right; may lie past either end.

        ``reach``: slots on each side, s unless :meth:`reach` says that fewer do.
        """
        reach = self.sparse_block_size if reach is None else reach
        left, right = (block - 1) * self.step, (block + 2) * self.step
        return (left - reach, left), (right, right + reach)


_LEAST = {
    "block_size": 1,
    "sparse_block_size": 0,
    "sparsity_factor": 0,
    "num_global_tokens": 0,
    "lsh_num_pre_rounds": 0,
    "lsh_seed": 0,
}
