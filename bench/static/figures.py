"""The figures of a kernel: compile it for a GPU that is not here, and read its binary.

It needs no GPU and no driver: ptxas and the disassemblers are in the triton wheel. The code of this file is part of
every kernel's key, so a change to it compiles all kernels again.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static.binary import GPUS

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Figures:
    """What a kernel's binary says.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        spill_bytes: of a thread, loads and stores together.
        shared_bytes: shared memory of a block.
        tensor_core_instructions, async_copies, float_atomics: instructions in the disassembly.
    """

    registers: int
    stack: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    async_copies: int
    float_atomics: int


# Instructions of the disassembly: HMMA, HGMMA, ... and MFMA, WMMA; LDGSTS (cp.async) and the bulk copies.
_TENSOR_CORE = re.compile(r"\b(?:[HDIOQ]G?MMA|UTC\w*MMA)\b|\bv_(?:mfma|wmma)_")
_ASYNC_COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b|\b(?:buffer|global)_load_\S*.*\blds\b")
# Atomics on floats, and the compare-and-swap of a loop that emulates them: RED.E.ADD.F32, ATOMG.E.CAS,
# global_atomic_add_f32, ds_add_f32. Atomics on bits do not count: a Blackwell kernel gets its tensor memory by them.
_FLOAT_ATOMIC = re.compile(
    r"\b(?:ATOM[GS]?|RED)\.\S*(?:F16|F32|F64|CAS)|\b(?:global|flat|buffer|ds)_\w*(?:add|min|max)_\w*f(?:16|32|64)\b"
    r"|\b(?:global|flat|buffer|ds)_\w*(?:cmpswap|cmpst)\w*"
)


def compile_kernel(source: ASTSource, target: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Triton's compiled kernel for ``target``, an NVIDIA architecture ``sm_*`` or an AMD one, and the log of ptxas."""
    lanes, log = GPUS[target].warp_size, io.StringIO()
    gpu = GPUTarget("cuda", int(target[3:]), lanes) if target.startswith("sm_") else GPUTarget("hip", target, lanes)
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True  # only the log has the spills
        return triton.compile(source, target=gpu, options=options), log.getvalue()


def compile_and_read(source: ASTSource, target: str, options: dict[str, Any]) -> Figures:
    """The figures of a kernel on ``target``."""
    kernel, log = compile_kernel(source, target, options)
    return _read_cubin(kernel, log) if target.startswith("sm_") else _read_amdgcn(kernel)


def _read_cubin(kernel: Any, log: str) -> Figures:
    """The spills come from the log of ptxas, the rest from the cubin."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not spills:
        raise RuntimeError("ptxas did not report spills")
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", print_cubin(cubin, "cuobjdump", "-res-usage")))
    return Figures(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        spill_bytes=sum(map(int, spills)),
        **_common_fields(kernel, print_cubin(cubin, "nvdisasm", "-c")),
    )


def print_cubin(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool of the triton wheel prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(kernel: Any) -> Figures:
    """The assembly's metadata counts VGPRs, used and spilled. Each has 4 bytes per lane."""
    text = kernel.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])

    return Figures(
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        spill_bytes=4 * metadata("vgpr_spill_count"),
        **_common_fields(kernel, text),
    )


def _common_fields(kernel: Any, text: str) -> dict[str, int]:
    """The fields that are read in the same way for both makers: Triton's metadata, and counts of instructions."""
    return {
        "shared_bytes": int(kernel.metadata.shared),
        "tensor_core_instructions": len(_TENSOR_CORE.findall(text)),
        "async_copies": len(_ASYNC_COPY.findall(text)),
        "float_atomics": len(_FLOAT_ATOMIC.findall(text)),
    }
