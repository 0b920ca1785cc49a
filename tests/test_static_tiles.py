"""bench.static.tiles: what stands in a loop is counted on its shortest way, and a loop that grows is a fault."""

from dataclasses import replace

import pytest
import torch

from bench.static import tiles
from bench.static.figures import compile_kernel
from bench.static.key import source_of
from bench.static.loops import count_around, count_loops
from bench.static.sass import Block, Instruction, code_of, read_code
from bench.static.yardstick import backward_yardstick, forward_yardstick
from lsg_attn.fused.schedules import Schedule, Tuning


def block(following, *opcodes):
    return Block([Instruction(opcode, "", False, 2) for opcode in opcodes], following)


# 0 jumps over or into a loop 2-3-4, in which 3 is jumped over; 5 loops alone; 6 is the end.
BLOCKS = [
    block([1, 5], "S2R", "BRA"),
    block([2], "MOV", "LDG"),
    block([3, 4], "FADD", "BRA"),
    block([4], "ISETP", "FSEL", "FSEL"),
    block([2, 5], "HMMA.16816.F32", "HGMMA.64x32x16.F32", "MUFU.EX2", "BRA"),
    block([5, 6], "IADD3", "BRA"),
    block([], "STG", "EXIT"),
]


def test_a_loop_is_counted_on_its_shortest_way():
    (counts,) = count_loops(code_of(BLOCKS))
    assert (counts.instructions, counts.longest, counts.stalls) == (6, 9, 12)
    assert (counts.tensor_core, counts.mufu, counts.fma, counts.alu) == (2, 1, 1, 0)
    assert counts.macs == 16 * 8 * 16 + 64 * 32 * 16 // 4


def test_around_the_loops_is_what_must_be_passed():
    """Blocks 0, 1, 5 and 6: not the way that jumps over the loop, and a loop without products once."""
    code = code_of(BLOCKS)
    (counts,) = count_loops(code)
    assert count_around(code, counts.macs) == 2 + 2 + 2 + 2


@pytest.mark.parametrize("target", tiles.RATES)
@pytest.mark.parametrize(("step", "products"), [(forward_yardstick, [2]), (backward_yardstick, [3, 4])])
def test_a_turn_of_the_yardsticks_loops_is_a_tile(step, products, target):
    """Else a loop that the compiler unrolled would count for one tile."""
    launch = step(torch.bfloat16, 64, Schedule(64, 64, Tuning(4, 2)))
    kernel, _ = compile_kernel(source_of(launch), target, launch.options)
    macs = [counts.macs for counts in count_loops(read_code(kernel.asm["cubin"]))]
    assert macs == [n * 64 * 64 * 64 // 4 for n in products]


def test_costs_are_kept_and_a_loop_that_is_too_long_is_a_fault(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiles.csv"
    arguments = ["--target", "sm_80", "--types", "pooling", "--csv", str(path), "--jobs", "1"]
    assert tiles.main(arguments) == 0
    costs = tiles.read_costs(path)
    expected = [("forward", "slots"), ("forward", "local"), ("dq", "slots"), ("dq", "local")]
    expected += [("dkv", "local"), ("dkv", "slots")]
    assert [(cost.step, cost.keys) for cost in costs] == 2 * expected
    assert [cost.has_mask for cost in costs] == 6 * [False] + 6 * [True]
    for cost in costs:
        assert cost.ratio == pytest.approx(cost.instructions / cost.yardstick)
        assert cost.tensor_core_cycles == {"forward": 1024, "dq": 768, "dkv": 1024}[cost.step]
        assert cost.cycles >= max(cost.tensor_core_cycles, cost.instructions)
        assert (cost.around > 0) == (0 < cost.outside < 1) == (cost.step == "forward")
    tiles.write_costs(path, costs)
    assert tiles.read_costs(path) == costs
    longer = replace(costs[0], instructions=1.01 * tiles.LIMITS["sm_80", "forward", "slots"] * costs[0].yardstick)
    monkeypatch.setattr(tiles, "_compile_all", lambda *_: [costs[1], longer])
    assert tiles.main([]) == 1
    assert capsys.readouterr().out.endswith("2 loops, 1 too long\n")
