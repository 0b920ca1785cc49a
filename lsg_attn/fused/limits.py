"""What the kernels cannot run, and why."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.autograd.forward_ad import unpack_dual

from ..call import Call
from .schedules import missing_rows, target_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_DIM = 256
_MAX_GLOBALS = 512
_MAX_HASHED = 128
_MIN_TRITON = (3, 6)  # 3.4 and 3.5 do not compile all of the kernels
_HAS_TRITON = find_spec("triton") is not None


def _triton_version() -> tuple[int, ...]:
    """The installed version, major and minor, without an import; the least that is taken where it is not known."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(PackageNotFoundError):
            return tuple(int(x) for x in version(name).split(".")[:2])
    return _MIN_TRITON


_TRITON = _triton_version()


def unsupported_reasons(call: Call) -> list[str]:
    """Why the kernels cannot run a call; empty if they can."""
    query, pattern = call.query, call.pattern
    reasons = []
    if not query.is_cuda:
        reasons.append(f"the tensors are on device {query.device}, the kernels need a CUDA or ROCm device")
    elif torch.version.hip is None and (found := torch.cuda.get_device_capability(query.device)) < _MIN_CAPABILITY:
        reasons.append("the GPU's compute capability is {}.{}, the kernels need {}.{}".format(*found, *_MIN_CAPABILITY))
    else:
        reasons += missing_rows(target_of(query.device), query.dtype, query.shape[-1], pattern.rule.is_hashed)
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    elif _TRITON < _MIN_TRITON:
        reasons.append("triton is {}.{}, the kernels need {}.{} or newer".format(*_TRITON, *_MIN_TRITON))
    if query.dtype not in _DTYPES:
        reasons.append(f"the dtype is {query.dtype}, the kernels take float16, bfloat16 and float32")
    if query.shape[-1] > _MAX_HEAD_DIM:
        reasons.append(f"head_dim is {query.shape[-1]}, the kernels take up to {_MAX_HEAD_DIM}")
    if pattern.num_global_tokens > _MAX_GLOBALS:
        reasons.append(f"num_global_tokens is {pattern.num_global_tokens}, the kernels take up to {_MAX_GLOBALS}")
    if pattern.rule.is_hashed and pattern.chunk > _MAX_HASHED:
        chunk = f"min(block_size, sparse_block_size) = {pattern.chunk}"
        reasons.append(f"lsh hashes chunks of {chunk} tokens, the kernels up to {_MAX_HASHED}")
    if call.scale <= 0:
        reasons.append(f"scale is {call.scale}, the kernels take one above 0")
    if call.section is not None and call.dropout_p and pattern.block_size % 4:
        size = f"block_size is {pattern.block_size}"
        reasons.append(f"{size}, the kernels share a sequence out with dropout where that is a multiple of 4")
    if has_tangent(call):
        reasons.append("a gradient by forward mode is asked for, the kernels have only gradients by reverse mode")
    return reasons


def has_tangent(call: Call) -> bool:
    """Whether autograd's forward mode asks for a gradient of the call."""
    inputs = (call.query, call.key, call.value)
    return not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in inputs)
