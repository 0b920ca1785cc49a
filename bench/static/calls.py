"""The calls whose kernels are compiled, and the label of each kernel: which of these calls it serves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from bench.static.key import key_of
from bench.static.meta import meta_call, meta_passes
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.call import Section
from lsg_attn.fused.launch import Launch
from lsg_attn.fused.schedules import missing_rows
from lsg_attn.sparsity import RULES


@dataclass(frozen=True)
class PlannedCall:
    """A call that dispatch may get. The planner decides which kernels it takes on a target."""

    sparsity_type: str
    dtype: torch.dtype
    head_dim: int
    has_mask: bool
    has_dropout: bool
    target: str
    has_backward: bool = True
    block_size: int = 128
    num_globals: int = 1
    causal: bool = False
    group: int = 1
    packed: bool = False
    sectioned: bool = False

    @property
    def name(self) -> str:
        """The sparsity type, and what sets the call apart from most: "norm causal"."""
        shared = [f"{self.group} heads share keys"] if self.group > 1 else []
        others = [name for name in ("causal", "packed", "sectioned") if getattr(self, name)]
        return " ".join([self.sparsity_type, *others, *shared])

    @property
    def is_supported(self) -> bool:
        """Whether dispatch has kernels for it."""
        is_hashed = RULES[self.sparsity_type].is_hashed
        return not missing_rows(self.target, self.dtype, self.head_dim, is_hashed)

    def launches(self) -> list[tuple[str, Launch]]:
        """The launches, each with its pass: "forward" or "backward"."""
        sizes = (self.block_size, self.block_size)
        pattern = LSGPattern(*sizes, 2, self.sparsity_type, self.num_globals, causal=self.causal)
        batch, heads, length = 2, 16, self.num_globals + 4096
        lengths = [length] * batch if self.packed else ()
        section = Section(0, 8192, 0, 4096 - 2 * self.block_size, True) if self.sectioned else None
        options = (self.dtype, self.has_mask, self.has_dropout, self.group, lengths, section)
        call = meta_call(pattern, (batch, heads, length, self.head_dim), *options)
        forward, backward = meta_passes(call, self.target)
        launches = [("forward", launch) for launch in forward.launches]
        if self.has_backward:
            launches += [("backward", launch) for launch in backward.launches]
        return launches


@dataclass(frozen=True)
class Label:
    """A kernel and the calls it serves. Where calls that share it differ, a field lists their values: "norm/lsh".

    ``types``: the calls' names.
    """

    kernel: str
    types: str
    passes: str
    dtype: str
    head_dim: str
    block_size: str
    num_globals: str
    mask: str
    dropout: str
    target: str

    def __str__(self) -> str:
        rest = (f"{field.name}={getattr(self, field.name)}" for field in fields(self)[1:])
        return " ".join((self.kernel, *rest))


def _label(call: PlannedCall, name: str, launch: Launch) -> Label:
    """The label of a kernel that serves one pass, ``name``, of one call."""
    return Label(
        kernel=launch.kernel.__name__,
        types=call.name,
        passes=name,
        dtype=str(call.dtype).removeprefix("torch."),
        head_dim=str(call.head_dim),
        block_size=str(call.block_size),
        num_globals=str(call.num_globals),
        mask="yes" if call.has_mask else "no",
        dropout="yes" if call.has_dropout else "no",
        target=call.target,
    )


def _merged(labels: Sequence[Label]) -> Label:
    """One label for all calls that share a kernel."""
    values = ([getattr(label, field.name) for label in labels] for field in fields(Label))
    return Label(*("/".join(dict.fromkeys(column)) for column in values))


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: its label, and where to find it, as launch number ``index`` of a call that it serves."""

    label: Label
    call: PlannedCall
    index: int

    @property
    def launch(self) -> Launch:
        """The launch."""
        return self.call.launches()[self.index][1]


def kernels_of(calls: Iterable[PlannedCall]) -> dict[str, Kernel]:
    """The kernels that calls take, each once, by key."""
    labels: dict[str, list[Label]] = {}
    places: dict[str, tuple[PlannedCall, int]] = {}
    for call in calls:
        for index, (name, launch) in enumerate(call.launches()):
            key = key_of(launch, call.target)
            labels.setdefault(key, []).append(_label(call, name, launch))
            places.setdefault(key, (call, index))
    return {key: Kernel(_merged(labels[key]), *places[key]) for key in places}


def planned_calls(subset: str, targets: Sequence[str]) -> Iterator[PlannedCall]:
    """The calls of a subset that the kernels take.

    "quick": bfloat16, head_dim 64, a mask; "ci": all dtypes, and for bfloat16 also dropout; "all": every combination
    with head_dim 64 and 128, with and without a mask and dropout, for the default pattern. "all" also has some calls
    with blocks smaller than a tile, many globals, and head_dim 256, some that are causal, some whose heads share keys,
    some of packed sequences and some of sections. Only some have a backward: see :func:`_has_backward`.
    """
    return (call for call in _every_call(subset, targets) if call.is_supported)


def _every_call(subset: str, targets: Sequence[str]) -> Iterator[PlannedCall]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    everything = itertools.product(SPARSITY_TYPES, dtypes, (64, 128), (True, False), (False, True), targets)
    for values in everything:
        call = PlannedCall(*values, has_backward=_has_backward(subset, *values[1:5]))
        is_main = call.head_dim == 64 and call.has_mask
        is_plain = call.dtype == torch.bfloat16 and not call.has_dropout
        if subset == "quick" and not (is_main and is_plain):
            continue
        if subset == "ci" and not (is_main and (not call.has_dropout or call.dtype == torch.bfloat16)):
            continue
        yield call
    if subset == "all":
        others = itertools.product(("norm", "lsh"), (torch.bfloat16, torch.float32), (False, True), targets)
        for sparsity_type, dtype, has_dropout, target in others:
            for head_dim, block_size, num_globals in ((64, 32, 1), (128, 128, 200), (256, 128, 1)):
                common = (sparsity_type, dtype, head_dim, True, has_dropout, target, not has_dropout)
                yield PlannedCall(*common, block_size, num_globals)
        for head_dim, target in itertools.product((64, 128), targets):
            masked = PlannedCall("norm", torch.bfloat16, head_dim, True, False, target)
            packed = replace(masked, has_mask=False, packed=True)
            yield replace(masked, causal=True)
            yield replace(masked, group=4)
            yield packed
            yield replace(packed, sparsity_type="bos_pooling")
            yield replace(masked, sectioned=True)
            yield replace(masked, sectioned=True, has_dropout=True)


def _has_backward(subset: str, dtype: torch.dtype, head_dim: int, has_mask: bool, has_dropout: bool) -> bool:
    """Whether a call's backward is compiled too. It takes longest, so calls that add little go without."""
    if subset != "all":
        return dtype == torch.bfloat16 and not has_dropout
    if dtype == torch.bfloat16:
        return has_mask or (head_dim == 64 and not has_dropout)
    # float16 has the tiles of bfloat16
    return has_mask and not has_dropout and (head_dim == 64 or dtype == torch.float32)
