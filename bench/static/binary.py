"""What a GPU has for a kernel's binary: its limits, and how many blocks of the kernel fit on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

_KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """What one multiprocessor has for the blocks that run on it; memory in bytes, registers of 4 bytes.

    A warp gets registers in units of so many for each lane. NVIDIA: CUDA C++ Programming Guide, technical
    specifications per compute capability; each block takes 1 KiB of shared memory more than it asks for. AMD: CDNA 3
    and RDNA 3 ISA guides; a multiprocessor is a compute unit of CDNA or a workgroup processor of RDNA, of four SIMDs.
    """

    warps: int
    blocks: int
    registers: int
    shared: int
    shared_of_block: int
    warp_size: int = 32
    shared_reserved: int = _KIB
    register_unit: int = 8


GPUS = {
    "sm_80": Gpu(64, 32, 65536, 164 * _KIB, 163 * _KIB),
    "sm_86": Gpu(48, 16, 65536, 100 * _KIB, 99 * _KIB),
    "sm_90": Gpu(64, 32, 65536, 228 * _KIB, 227 * _KIB),
    "sm_100": Gpu(64, 32, 65536, 228 * _KIB, 227 * _KIB),
    "sm_120": Gpu(48, 24, 65536, 100 * _KIB, 99 * _KIB),
    "gfx942": Gpu(32, 32, 4 * 512 * 64, 64 * _KIB, 64 * _KIB, warp_size=64, shared_reserved=0),
    **{
        name: Gpu(64, 32, 4 * 1536 * 32, 128 * _KIB, 64 * _KIB, shared_reserved=0, register_unit=24)
        for name in ("gfx1100", "gfx1201")
    },
}


def target_of(name: str) -> GPUTarget:
    """Triton's description of a GPU."""
    lanes = GPUS[name].warp_size
    return GPUTarget("cuda", int(name[3:]), lanes) if name.startswith("sm_") else GPUTarget("hip", name, lanes)


def num_blocks(target: str, registers: int, shared: int, num_warps: int) -> int:
    """How many blocks a multiprocessor of one of ``GPUS`` holds at once; 0 if a block's shared memory does not fit."""
    gpu = GPUS[target]
    if shared > gpu.shared_of_block:
        return 0
    unit = gpu.register_unit
    per_warp = -(-max(registers, 1) // unit) * unit * gpu.warp_size
    warps = gpu.registers // per_warp
    if not target.startswith("sm_"):  # a wave has its registers from one SIMD of four
        warps = 4 * min(gpu.warps // 4, gpu.registers // 4 // per_warp)
    by_shared = gpu.shared // (shared + gpu.shared_reserved) if shared + gpu.shared_reserved else gpu.blocks
    return min(gpu.blocks, gpu.warps // num_warps, warps // num_warps, by_shared)
