"""LSG (Local + Sparse + Global) attention for PyTorch."""

from .functional import lsg_attention
from .layer import LSGAttention
from .pattern import SPARSITY_TYPES, LSGPattern
from .varlen import lsg_attention_varlen

__all__ = ["SPARSITY_TYPES", "LSGAttention", "LSGPattern", "lsg_attention", "lsg_attention_varlen"]
__version__ = "0.1.0"
