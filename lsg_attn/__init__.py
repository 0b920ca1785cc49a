"""LSG (Local + Sparse + Global) attention for PyTorch."""

from .functional import lsg_attention
from .layer import LSGAttention
from .pattern import SPARSITY_TYPES, LSGPattern

__all__ = ["SPARSITY_TYPES", "LSGAttention", "LSGPattern", "lsg_attention"]
__version__ = "0.1.0"
