"""What a compiled kernel's binary says: registers, spills, shared memory, instructions, and how many fit on a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """What one multiprocessor has for the blocks that run on it; memory in bytes, registers of 4 bytes.

    NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability; each block takes 1 KiB of
    shared memory more than it asks for. AMD: CDNA 3 ISA guide; a multiprocessor is a compute unit of four SIMDs.
    """

    warps: int
    blocks: int
    registers: int
    shared: int
    shared_of_block: int
    warp_size: int = 32
    shared_reserved: int = _KIB


GPUS = {
    "sm_80": Gpu(64, 32, 65536, 164 * _KIB, 163 * _KIB),
    "sm_86": Gpu(48, 16, 65536, 100 * _KIB, 99 * _KIB),
    "sm_90": Gpu(64, 32, 65536, 228 * _KIB, 227 * _KIB),
    "sm_100": Gpu(64, 32, 65536, 228 * _KIB, 227 * _KIB),
    "sm_120": Gpu(48, 24, 65536, 100 * _KIB, 99 * _KIB),
    "gfx942": Gpu(32, 32, 4 * 512 * 64, 64 * _KIB, 64 * _KIB, warp_size=64, shared_reserved=0),
}


# Instructions of the disassembly: HMMA, HGMMA, ... and MFMA, WMMA; LDGSTS (cp.async) and the bulk copies.
_TENSOR_CORE = re.compile(r"\b(?:[HDIOQ]G?MMA|UTC\w*MMA)\b|\bv_(?:mfma|wmma)_")
_ASYNC_COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b|\b(?:buffer|global)_load_\S*.*\blds\b")
# Atomics on floats, and the compare-and-swap of a loop that makes them: RED.E.ADD.F32, ATOMG.E.CAS,
# global_atomic_add_f32, ds_add_f32. Not those on bits by which a Blackwell kernel gets its tensor memory.
_FLOAT_ATOMIC = re.compile(
    r"\b(?:ATOM[GS]?|RED)\.\S*(?:F16|F32|F64|CAS)|\b(?:global|flat|buffer|ds)_\w*(?:add|min|max)_\w*f(?:16|32|64)\b"
    r"|\b(?:global|flat|buffer|ds)_\w*(?:cmpswap|cmpst)\w*"
)


def read_cubin(kernel: Any, log: str) -> dict[str, int]:
    """ptxas' log has the spills; a cubin the rest."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not spills:
        raise RuntimeError("ptxas said nothing about spills")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", file.name)))
        text = _run("nvdisasm", "-c", file.name)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spill_bytes": sum(map(int, spills)),
        **_whatever_the_maker(kernel, text),
    }


def read_amdgcn(kernel: Any) -> dict[str, int]:
    """The assembly's metadata counts VGPRs, and spilled ones, of 4 bytes in each lane."""
    text = kernel.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spill_bytes": 4 * metadata("vgpr_spill_count"),
        **_whatever_the_maker(kernel, text),
    }


def _whatever_the_maker(kernel: Any, text: str) -> dict[str, int]:
    """What is read alike: Triton's metadata, and the instructions in the disassembly."""
    return {
        "shared_bytes": int(kernel.metadata.shared),
        "tensor_core_instructions": len(_TENSOR_CORE.findall(text)),
        "async_copies": len(_ASYNC_COPY.findall(text)),
        "float_atomics": len(_FLOAT_ATOMIC.findall(text)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def num_blocks(gpu: Gpu, is_cuda: bool, registers: int, shared: int, num_warps: int) -> int:
    """How many blocks a multiprocessor holds at once; 0 if a block's shared memory does not fit."""
    if shared > gpu.shared_of_block:
        return 0
    # Registers are given out to a warp, in units of 8 for each lane.
    of_warp = -(-max(registers, 1) // 8) * 8 * gpu.warp_size
    warps = gpu.registers // of_warp
    if not is_cuda:  # a wave has its registers from one SIMD of four
        warps = 4 * min(gpu.warps // 4, gpu.registers // 4 // of_warp)
    by_shared = gpu.shared // (shared + gpu.shared_reserved) if shared + gpu.shared_reserved else gpu.blocks
    return min(gpu.blocks, gpu.warps // num_warps, warps // num_warps, by_shared)
