"""What the compiled steps cannot run, and why."""

from __future__ import annotations

import torch

from ..call import Call
from . import library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reasons(call: Call) -> list[str]:
    """Why the C++ cannot run a call; empty if it can. The first call that it might run builds it."""
    query = call.query
    reasons = []
    if not query.is_cpu:
        reasons.append(f"the tensors are on device {query.device}, the C++ is for CPUs")
    if query.dtype not in _DTYPES:
        reasons.append(f"the dtype is {query.dtype}, the C++ takes float32, bfloat16 and float16")
    if query.dtype == torch.bfloat16 and query.shape[-1] % 2:
        reasons.append(f"head_dim is {query.shape[-1]}, in bfloat16 the C++ takes even ones")
    if call.dropout_p:
        reasons.append(f"dropout_p is {call.dropout_p}, the C++ has no dropout")
    # Nothing is built while torch.compile traces a call: the operator that it leaves in the graph asks again.
    if not reasons and not torch.compiler.is_compiling() and (reason := library.missing_reason()):
        reasons.append(reason)
    return reasons
