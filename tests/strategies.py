"""Hypothesis strategies: small patterns, lengths and inputs that reach every branch."""

from hypothesis import assume
from hypothesis import strategies as st

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.testing import PADDINGS

# (tokens, head_dim, num_global_tokens, padding) for blocks of B = 32: T = 1, 2B-1, 2B, 2B+1, 7B-3, 9B
AWKWARD_SHAPES = [
    (1, 24, 0, "none"),
    (63, 64, 1, "right"),
    (64, 80, 17, "left"),
    (65, 40, 130, "middle"),
    (7 * 32 - 3, 128, 1, "random"),
    (9 * 32, 64, 17, "right"),
]
IMPLEMENTATIONS = ("reference", "torch")
HEADS = 3


@st.composite
def patterns(draw, types=SPARSITY_TYPES, max_sparse=2.5, causal=False):
    """Valid patterns with blocks of 1 to 12, also with s not a multiple of the step, f = 1, f = B, s = 0.

    ``causal``: True, False, or None for both.
    """
    block_size = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    factors = [f for f in range(1, block_size + 1) if block_size % f == 0]
    try:
        return LSGPattern(
            block_size=block_size,
            sparse_block_size=draw(st.integers(0, int(max_sparse * block_size))),
            sparsity_factor=draw(st.sampled_from([0, *factors])),
            sparsity_type=draw(st.sampled_from(types)),
            num_global_tokens=draw(st.integers(0, block_size + 2)),
            lsh_num_pre_rounds=draw(st.integers(0, 2)),
            lsh_seed=draw(st.integers(0, 3)),
            causal=draw(st.booleans()) if causal is None else causal,
        )
    except ValueError:
        assume(False)


@st.composite
def cases(draw, **options):
    """A pattern, a length G+T of up to 7 blocks, and a padding."""
    pattern = draw(patterns(**options))
    num_tokens = draw(st.integers(1, 7 * pattern.block_size + 1))
    return pattern, pattern.num_global_tokens + num_tokens, draw(st.sampled_from(PADDINGS))
