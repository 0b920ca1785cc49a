"""LSG (Local + Sparse + Global) attention for PyTorch."""

from .functional import lsg_attention
from .global_positions import with_global_positions
from .inspection import attention_weights
from .layer import LSGAttention
from .multihead import LSGMultiheadAttention
from .pattern import SPARSITY_TYPES, LSGPattern
from .varlen import lsg_attention_varlen

__all__ = [
    "SPARSITY_TYPES",
    "LSGAttention",
    "LSGMultiheadAttention",
    "LSGPattern",
    "attention_weights",
    "lsg_attention",
    "lsg_attention_varlen",
    "with_global_positions",
]
__version__ = "0.2.0"
