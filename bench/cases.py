"""What a run measures: a case is one step on one shape and device, a section fills a table, a plan lists sections."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.cli.sizes import BART_SIZES, Size

FORWARD, BACKWARD, TRAIN = "forward", "forward+backward", "train"
OURS = ("lsg triton", "lsg cpp", "lsg torch")  # ratios are to the first of these that can run a case
OWN = (*OURS, "lsg reference")
# Groups of peers: a section that names one measures only the peers that are in it.
SEQ2SEQ = "seq2seq"  # encoders of BART's kind
TYPES_FORWARD, PATTERNS = "types, forward", "patterns"  # attentions whose cost depends on the pattern
LONG = "long"  # attentions that take long inputs in a short time
PATTERN = LSGPattern()
SIZES = {
    **BART_SIZES,
    "layer": replace(BART_SIZES["base"], layers=1),
    "roberta": replace(BART_SIZES["base"], layers=12),  # the train step in lsg-converter's README
    # for checks and dry runs, with head_dim 64 like the others: a check then compiles the kernels that are timed
    "tiny": Size(1024, 1, 16, 64),
}


def ours_of(peers: Container[str]) -> str | None:
    """The one of our implementations that the others' ratios refer to, if these peers include any."""
    return next((name for name in OURS if name in peers), None)


@dataclass(frozen=True)
class TimedCase:
    """One step on one shape and device.

    ``level``: ``"attention"``, on queries, keys and values with ``size``'s heads, or ``"encoder"``, on ``batch``
    documents of ``tokens`` tokens. ``step``: ``"forward"``, without gradients; ``"forward+backward"``, without dropout;
    or ``"train"``, with dropout, a loss and an optimizer.
    """

    level: str
    size_name: str
    tokens: int
    step: str = FORWARD
    batch: int = 1
    pattern: LSGPattern = PATTERN
    dtype_name: str = "float32"
    device: str = "cpu"

    @property
    def size(self) -> Size:
        """The size of the encoder; an attention has its heads."""
        return SIZES[self.size_name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and weights."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def length(self) -> int:
        """G+T, the number of positions in LSG attention."""
        return self.pattern.num_global_tokens + self.tokens

    def describe(self) -> dict[str, Any]:
        """The case as a record holds it."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> TimedCase:
        """The case that :meth:`describe` gave."""
        return TimedCase(**{**record, "pattern": LSGPattern(**record["pattern"])})


@dataclass(frozen=True)
class Section:
    """The cases of one table.

    ``compares``: ``"peers"``, or what else differs between its cases or between it and another section. ``group``: the
    group of peers that it measures; by default all peers of its level. ``seconds``: how long to repeat each case, at
    least ``least`` times. ``memory``: the lengths at which peak memory is measured too.
    """

    title: str
    cases: tuple[TimedCase, ...]
    compares: str = "peers"
    group: str = ""
    seconds: float = 10.0
    least: int = 3
    memory: tuple[int, ...] = ()

    @property
    def keeps_memory(self) -> bool:
        """Whether it is measured, on a CPU, with an allocator that keeps freed memory."""
        return self.compares == "allocators"


@dataclass(frozen=True)
class _Device:
    """What differs between the plans for devices."""

    dtype_name: str
    other_dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    backward_lengths: tuple[int, ...]
    encoder_lengths: tuple[int, ...]
    train_size: str
    seconds: float


_DEVICES = {
    "cpu": _Device(
        "float32",
        ("bfloat16", "float16"),
        (512, 1024, 2048, 4096, 8192, 16384),
        (512, 1024, 2048, 4096, 8192),
        (1024, 2048, 4096, 16384),
        "layer",  # a step of more layers takes minutes
        5.0,
    ),
    "cuda": _Device(
        "bfloat16",
        ("float16", "float32"),
        (1024, 4096, 16384, 131072),
        (1024, 4096, 16384, 131072),
        (1024, 4096, 16384, 131072),
        "roberta",
        1.0,
    ),
}
# the patterns of the train step in lsg-converter's README, besides the default
_TRAIN_PATTERNS = (
    LSGPattern(block_size=256, sparse_block_size=0, sparsity_type="none"),
    LSGPattern(block_size=32, sparse_block_size=32),
)


def plan(device: str, quick: bool) -> list[Section]:
    """The sections of a run on ``"cpu"`` or ``"cuda"``, the most informative first."""
    what = _DEVICES[device]
    attention = TimedCase("attention", "large", 4096, dtype_name=what.dtype_name, device=device)
    encoder = replace(attention, level="encoder", size_name="base")
    train = replace(encoder, step=TRAIN, batch=4, size_name=what.train_size)
    backward = replace(attention, step=BACKWARD)
    names = (f"attention, {FORWARD}", f"attention, {BACKWARD}", f"encoder of BART-base's size, {FORWARD}", "train step")
    if quick:
        few: dict[str, Any] = {"seconds": 1.0, "least": 2}
        one = replace(train, batch=1, tokens=1024, size_name="layer")
        return [
            Section(names[0], (attention,), memory=(4096,), **few),
            Section(names[1], (backward,), memory=(4096,), **few),
            Section(names[2], _over(encoder, (2048,)), group=SEQ2SEQ, memory=(2048,), **few),
            Section(names[3], (one,), **few),
        ]
    every = what.lengths
    times: dict[str, Any] = {"seconds": what.seconds}
    middle, ends = (attention.tokens,), (every[0], attention.tokens, every[-1])
    layer, large = replace(encoder, size_name="layer"), replace(encoder, size_name="large")
    types = [LSGPattern(sparsity_type=name) for name in SPARSITY_TYPES]
    sections = [
        Section(names[0], _over(attention, every), memory=ends, least=5, **times),
        Section(names[1], _over(backward, what.backward_lengths), memory=ends, least=5, **times),
        Section(names[2], _over(encoder, what.encoder_lengths), group=SEQ2SEQ, memory=ends, **times),
        Section(names[3], (train,), memory=middle, least=2, **times),
        Section(f"one encoder layer, {FORWARD}", (layer,), memory=middle, **times),
        Section(f"one encoder layer, {BACKWARD}", (replace(layer, step=BACKWARD),), **times),
        Section(f"encoder of BART-large's size, {FORWARD}", (large,), group=SEQ2SEQ, least=2, **times),
        Section(f"sparsity types, {FORWARD}", _with(attention, types), "types", TYPES_FORWARD, **times),
        Section(f"sparsity types, {BACKWARD}", _with(backward, types), "types", PATTERNS, **times),
    ]
    if device == "cpu":
        kept = {FORWARD: attention, BACKWARD: backward}
        sections += [
            Section(f"attention, freed memory kept, {step}", (case,), "allocators", **times)
            for step, case in kept.items()
        ]
        long = _over(attention, (4096, 16384, 65536, 131072))
        sections.append(Section(f"long inputs, {FORWARD}", long, "lengths", LONG, least=3, seconds=4.0))
    dtypes = [
        Section(
            f"dtypes, {case.step}",
            tuple(replace(case, dtype_name=name, tokens=n) for name in what.other_dtypes for n in (1024, case.tokens)),
            "dtypes",
            **times,
        )
        for case in (attention, backward)
    ]
    return [
        *sections,
        *dtypes,
        Section("train step, other patterns", _with(train, _TRAIN_PATTERNS), "patterns", PATTERNS, least=2, **times),
    ]


def _over(case: TimedCase, lengths: Sequence[int]) -> tuple[TimedCase, ...]:
    return tuple(replace(case, tokens=tokens) for tokens in lengths)


def _with(case: TimedCase, patterns: Sequence[LSGPattern]) -> tuple[TimedCase, ...]:
    return tuple(replace(case, pattern=pattern) for pattern in patterns)


def shrink(sections: list[Section]) -> list[Section]:
    """The same sections with tiny shapes on the CPU and no case twice: a dry run tries a GPU's plan without a GPU."""
    few: dict[str, Any] = {"seconds": 0.0, "least": 1, "memory": ()}
    return [
        replace(section, cases=tuple(dict.fromkeys(_tiny(case) for case in section.cases)), **few)
        for section in sections
    ]


def _tiny(case: TimedCase) -> TimedCase:
    pattern = case.pattern
    sparse = min(pattern.sparse_block_size, 16)
    small = replace(pattern, block_size=16, sparse_block_size=sparse)
    return replace(
        case,
        size_name="tiny",
        tokens=1024,  # enough for BigBird's sparse attention, and a multiple of Longformer's window
        batch=min(case.batch, 2),
        pattern=small,
        dtype_name="float32" if case.dtype_name == "float32" else "bfloat16",  # float16 takes many times as long
        device="cpu",
    )
