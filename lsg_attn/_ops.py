"""The namespace of the operators, named as the package: a copy of it under another name has operators of its own.

PyTorch knows one operator of a name, the last one registered. A process may hold two versions of the library, one of
them loaded by Hugging Face's ``kernels``, whose builder writes a module with this name and these two members.
"""

from typing import Any

import torch

_NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

ops: Any = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{_NAMESPACE}::{op_name}"
