"""The machine code of a cubin: its instructions, the blocks that run without a branch, and the loops of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from bench.static.figures import print_cubin

# An instruction has two lines: its text and low word, then the high word, which has the control bits.
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z]\S*)\s*(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# ptxas also leaves a loop by a call that nothing returns from. A call of a function has no such label.
_JUMPS = ("BRA", "CALL.REL.NOINC")


class Instruction(NamedTuple):
    """An opcode with its modifiers, its operands, whether a predicate guards it, and the cycles it stalls for."""

    opcode: str
    operands: str
    is_guarded: bool
    stall: int


class Block(NamedTuple):
    """Instructions that run one after another, and the numbers of the blocks that may follow."""

    instructions: Sequence[Instruction]
    following: Sequence[int]


class Loop(NamedTuple):
    """A loop by its blocks' numbers: the head, the blocks that branch back to it, and the body, which has both."""

    head: int
    latches: frozenset[int]
    body: frozenset[int]


class Code(NamedTuple):
    """A kernel's blocks; an order in which each is before all that follow it, but for branches back; its loops.

    Only innermost loops are loops here, in that order.
    """

    blocks: Sequence[Block]
    order: Sequence[int]
    loops: Sequence[Loop]


def read_code(cubin: bytes) -> Code:
    """The code of a cubin of one kernel."""
    return code_of(_blocks(*_disassemble(cubin)))


def code_of(blocks: Sequence[Block]) -> Code:
    """The code that has these blocks, of which the kernel begins with the first."""
    order, latches = _traverse(blocks)
    bodies = {head: _body(blocks, head, latches[head]) for head in latches}
    heads = [head for head in order if head in bodies and not (bodies[head] & bodies.keys()) - {head}]
    return Code(blocks, order, [Loop(head, frozenset(latches[head]), bodies[head]) for head in heads])


def _disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and of each label the number of the instruction that it stands before."""
    lines = print_cubin(cubin, "nvdisasm", "-c", "-hex").splitlines()
    instructions: list[Instruction] = []
    labels = {}
    for line, following in pairwise([*lines, ""]):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            high = _HIGH_WORD.match(following)
            if high is None:
                raise RuntimeError(f"nvdisasm gave no second word after {line!r}")
            stall = int(high[1], 16) >> 41 & 0xF
            instructions.append(Instruction(found[2], found[3], found[1] is not None, stall))
    return instructions, labels


def _blocks(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Block]:
    """The blocks, in the order of the code."""
    after_jumps = (i + 1 for i, x in enumerate(instructions) if x.opcode in (*_JUMPS, "EXIT"))
    starts = sorted({0, *labels.values(), *after_jumps} - {len(instructions)})
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for start, stop in pairwise([*starts, len(instructions)]):
        last = instructions[stop - 1]
        target = _TARGET.search(last.operands) if last.opcode in _JUMPS else None
        following = [number[labels[target[1]]]] if target else []
        # A branch has its condition before it, or as its first operand.
        is_certain = not last.is_guarded and (last.opcode == "EXIT" or (target is not None and target.start() == 0))
        if not is_certain and stop in number:
            following.append(number[stop])
        blocks.append(Block(instructions[start:stop], following))
    return blocks


def _traverse(blocks: Sequence[Block]) -> tuple[list[int], dict[int, set[int]]]:
    """The order of :class:`Code`; and by the head of each loop, inner or not, the blocks that branch back to it."""
    finished: list[int] = []
    latches: dict[int, set[int]] = {}
    path, on_path, seen = [(0, iter(blocks[0].following))], {0}, {0}
    while path:
        block, rest = path[-1]
        following = next(rest, None)
        if following is None:
            finished.append(block)
            on_path.remove(block)
            path.pop()
        elif following in on_path:
            latches.setdefault(following, set()).add(block)
        elif following not in seen:
            seen.add(following)
            on_path.add(following)
            path.append((following, iter(blocks[following].following)))
    return finished[::-1], latches


def _body(blocks: Sequence[Block], head: int, latches: set[int]) -> frozenset[int]:
    """The head, and the blocks from which a branch back to it can be reached without passing it."""
    before: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        for following in block.following:
            before.setdefault(following, []).append(i)
    body, rest = {head}, list(latches)
    while rest:
        i = rest.pop()
        if i not in body:
            body.add(i)
            rest += before.get(i, [])
    return frozenset(body)
