"""What a warp does in the loops of a kernel, and around them: instructions by pipe.

Of a loop and of the way to it, the shortest way counts: a branch that most tiles jump over is not on it. These are
counts, not times.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from bench.static.sass import Block, Code, Instruction, Loop

# Opcodes by the pipe that they are issued to, on sm_80 to sm_120. The first that matches counts.
_PIPES = {
    "tensor_core": r"[HDIOQ]G?MMA|UTC\w*MMA",
    "mufu": r"MUFU|[FI]2[FI](?!P)",
    "fma": r"FADD|FMUL|FFMA|IMAD",
    "alu": r"F(SEL|SETP|MNMX|CHK|SET)|F2FP|I(ADD|SETP|MNMX|ABS|2FP)|V(IADD|IMNMX|ABSDIFF)|LOP3?|PLOP3|SHF|SHL|SHR|LEA"
    r"|SEL|PRMT|MOV|P2R|R2P|SGXT|BMSK|POPC|FLO|CS2R",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "memory": r"LDG|STG|LDGSTS|UTMA|UBLKCP|LD\b|ST\b",
    "spill": r"LDL|STL",
    "shuffle": r"SHFL|REDUX|VOTE",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|FENCE|MEMBAR|BSYNC|BSSY|ARRIVES",
}
_PIPE = re.compile("|".join(f"(?P<{name}>(?:{opcodes}))" for name, opcodes in _PIPES.items()))
_MATMUL = re.compile(r"(HG?MMA)\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(8|16))\b")


@dataclass(frozen=True)
class Counts:
    """What one warp does in one way around a loop.

    Attributes:
        instructions: all of the shortest way, on which the other counts are too.
        longest: all of the longest way.
        tensor_core, mufu, fma, alu, shared, memory, spill, shuffle, barrier: instructions of each pipe. ``alu``:
            integers, logic, selection, comparison, minimum and maximum; ``fma`` has the products of integers too.
        stalls: cycles that the control words let pass: those of a warp that never waits for a result of memory or of
            a tensor core.
        macs: products of the tensor cores; of a warp group's, a quarter.
    """

    instructions: int
    longest: int
    tensor_core: int
    mufu: int
    fma: int
    alu: int
    shared: int
    memory: int
    spill: int
    shuffle: int
    barrier: int
    stalls: int
    macs: int


def count_loops(code: Code) -> list[Counts]:
    """The counts of each innermost loop of ``code`` that has tensor-core instructions, in the code's order."""
    return [counts for counts in (_count(code, loop) for loop in code.loops) if counts.tensor_core]


def count_around(code: Code, macs: int) -> int:
    """The instructions of a way from the kernel's first to its last that goes through all loops of so many ``macs``.

    Those of these loops themselves are not counted, those of other loops once.
    """
    through = [loop for loop in code.loops if _count(code, loop).macs == macs]
    inside = frozenset[int]().union(*(loop.body for loop in through))
    heads = [loop.head for loop in through]
    # The fewest instructions up to and with a block, by the block and how many of the loops the way went through.
    cost = {(code.order[0], 0): _size(code.blocks, code.order[0], inside)}
    place = {i: at for at, i in enumerate(code.order)}
    for i in code.order:
        for passed in range(len(heads) + 1):
            if (i, passed) in cost:
                # not by a branch back
                for j in (j for j in code.blocks[i].following if place[j] > place[i]):
                    state = j, passed + (passed < len(heads) and j == heads[passed])
                    through_i = cost[i, passed] + _size(code.blocks, j, inside)
                    cost[state] = min(cost.get(state, through_i), through_i)
    ends = (i for i in code.order if not code.blocks[i].following)
    return min(cost[end, len(heads)] for end in ends if (end, len(heads)) in cost)


def _size(blocks: Sequence[Block], block: int, free: Container[int]) -> int:
    return 0 if block in free else len(blocks[block].instructions)


def _count(code: Code, loop: Loop) -> Counts:
    order = [i for i in code.order if i in loop.body]
    ways = [_way(code.blocks, order, loop, sign) for sign in (1, -1)]
    shortest, longest = ([x for i in way for x in code.blocks[i].instructions] for way in ways)
    pipes = [found.lastgroup for x in shortest if (found := _PIPE.match(x.opcode))]
    return Counts(
        instructions=len(shortest),
        longest=len(longest),
        **{name: pipes.count(name) for name in _PIPES},
        stalls=sum(max(x.stall, 1) for x in shortest),
        macs=sum(map(_macs, shortest)),
    )


def _way(blocks: Sequence[Block], order: Sequence[int], loop: Loop, sign: int) -> list[int]:
    """The blocks of the way from a loop's head to a branch back that is shortest, or longest where sign is -1."""
    cost = {loop.head: sign * len(blocks[loop.head].instructions)}
    before: dict[int, int] = {}
    for i in order:
        for j in blocks[i].following:
            if j in loop.body and j != loop.head:
                through = cost[i] + sign * len(blocks[j].instructions)
                if j not in cost or through < cost[j]:
                    cost[j], before[j] = through, i
    way = [min(loop.latches, key=cost.__getitem__)]
    while way[-1] != loop.head:
        way.append(before[way[-1]])
    return way[::-1]


def _macs(instruction: Instruction) -> int:
    found = _MATMUL.match(instruction.opcode)
    if found is None:
        return 0
    m, n, k = (int(size) for size in found.groups()[1:] if size)
    return m * n * k // (4 if found[1] == "HGMMA" else 1)
