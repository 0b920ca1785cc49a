"""bench.profile: which part of the work a sample belongs to, and the table of the documentation."""

from pathlib import Path

import pytest

from bench import profile

ROOT = Path(__file__).parent.parent
JIT, OURS, COPIES, TORCH, SYSTEM = profile.PARTS


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("    7f5ac469451f [unknown] ([JIT] tid 13487)", JIT),
        ("7f01 lsg::Forward<float>::attend(int, (anonymous namespace)::X) (/root/.cache/a b/lsg_attn_cpp.so)", OURS),
        ("7f02 __memmove_avx512_unaligned_erms (/usr/lib/libc.so.6)", COPIES),
        ("7f02 malloc (/usr/lib/libc.so.6)", None),
        ("7f03 at::native::gather (/x/libtorch_cpu.so)", TORCH),
        ("ffffffff81 clear_page_erms ([kernel.kallsyms])", SYSTEM),
        ("7f04 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)", None),
    ],
)
def test_a_sample_belongs_to_a_part(line, part):
    assert profile.part_of(*profile._parsed(line)) == part


def test_shares_leave_out_what_belongs_to_no_part():
    samples = {("lsg_attn_cpp.so", "a"): 2, ("lsg_attn_cpp.so", "b"): 1, ("libtorch.so", "c"): 1, ("python", "d"): 96}
    assert profile.shares(samples) == {JIT: 0, OURS: 0.75, COPIES: 0, TORCH: 0.25, SYSTEM: 0}
    with pytest.raises(ValueError, match="got none"):
        profile.shares({("python", "d"): 96})


def test_the_page_has_the_file():
    page = (ROOT / "docs/cpu.md").read_text(encoding="utf-8")
    lines = profile.table(ROOT / "bench/results/profile/amd-epyc.jsonl")
    assert len(lines) == 2 + len(profile.PARTS)
    assert "\n".join(lines) in page
