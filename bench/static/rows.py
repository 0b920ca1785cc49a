"""The rows of compiled kernels: their faults, the CSV they are kept in, and the summary by kernel and GPU."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from bench.static.binary import GPUS, num_blocks
from bench.static.calls import Label
from bench.static.figures import Figures
from lsg_attn import SPARSITY_TYPES

MAX_SPILL_BYTES = 64  # that a kernel may spill per thread; one that most calls take may spill one register, once
_REGISTER = 8  # bytes that one register is stored and loaded by
# Schedules that were measured to be the fastest all the same may spill more, by kernel, target and head_dim. They spill
# outside their loops: on an H200 such a backward took half the time of one of 8 warps, which spills nothing.
_SPILLS_OF_MEASURED = {
    ("_lsg_fwd_kernel", "sm_90", "128"): 84,  # in float16, of block_stride; others up to 64
    ("_lsg_bwd_dq_dkv_kernel", "sm_90", "128"): 848,  # where heads share keys; others up to 416
}
# A section's backward with dropout keeps the most values of all. It has run on no GPU of this kind.
_SPILLS_OF_SECTIONS = {("_lsg_bwd_dq_dkv_kernel", "sm_100", "128"): 104}
_MATMULS = ("_lsg_lsh_kernel", "_lsg_fwd_kernel", "_lsg_bwd_slots_kernel", "_lsg_bwd_dq_dkv_kernel")


@dataclass(frozen=True)
class Row:
    """One compiled kernel: its label, its figures, how it was compiled, its key, and the digest of its first stage."""

    label: Label
    figures: Figures
    num_warps: int
    num_stages: int
    triton: str
    key: str
    stage: str = ""

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        label, figures = self.label, self.figures
        return num_blocks(label.target, figures.registers, figures.shared_bytes, self.num_warps)

    @property
    def occupancy(self) -> float:
        """The part of a multiprocessor's warps that these blocks fill."""
        return self.blocks_per_sm * self.num_warps / GPUS[self.label.target].warps

    def columns(self) -> dict[str, str]:
        """The row's cells in the CSV, by column."""
        derived = {"blocks_per_sm": self.blocks_per_sm, "occupancy": f"{self.occupancy:.4f}"}
        rest = {name: getattr(self, name) for name in ("triton", "key", "stage")}
        compiled = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        cells = {**asdict(self.label), **asdict(self.figures), **compiled, **derived, **rest}
        return {name: str(value) for name, value in cells.items()}


def faults(row: Row) -> list[str]:
    """What is wrong with a compiled kernel; empty if it may ship."""
    label, figures, wrong = row.label, row.figures, []
    known = _SPILLS_OF_SECTIONS if "sectioned" in label.types and label.dropout == "yes" else _SPILLS_OF_MEASURED
    may_spill = known.get(
        (label.kernel, label.target, label.head_dim), _REGISTER if _is_main(label) else MAX_SPILL_BYTES
    )
    if figures.spill_bytes > may_spill:
        wrong.append(f"spills {figures.spill_bytes} bytes, more than {may_spill}")
    limit = GPUS[label.target].shared_of_block
    if figures.shared_bytes > limit:
        wrong.append(f"takes {figures.shared_bytes} bytes of shared memory, more than {limit}")
    if figures.float_atomics:
        wrong.append(f"has {figures.float_atomics} atomics on floats, which make the order of sums depend on timing")
    is_matmul = label.kernel in _MATMULS and (label.kernel == "_lsg_lsh_kernel" or label.dtype != "float32")
    if is_matmul and not figures.tensor_core_instructions:
        wrong.append("has no tensor-core instruction")
    return [f"{label} {what}" for what in wrong]


def _is_main(label: Label) -> bool:
    """Whether most calls take the kernel on the GPUs that most have."""
    is_default = (label.dtype, label.block_size, label.num_globals, label.dropout) == ("bfloat16", "128", "1", "no")
    is_default = is_default and any(name in SPARSITY_TYPES for name in label.types.split("/"))
    return is_default and label.head_dim in ("64", "128") and label.target in ("sm_80", "sm_90")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, sorted by label, with one header line."""
    ordered = sorted(rows, key=lambda row: tuple(asdict(row.label).values()))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.columns() for row in ordered)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV that :func:`write_rows` wrote.

    Raises:
        ValueError: if the file's columns are not those of a row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or [*reader.fieldnames] != _COLUMNS:
            raise ValueError(f"{path}: expected the columns {_COLUMNS}, got {reader.fieldnames}")
        return [
            Row(
                label=Label(**{field.name: cells[field.name] for field in fields(Label)}),
                figures=Figures(**{field.name: int(cells[field.name]) for field in fields(Figures)}),
                num_warps=int(cells["num_warps"]),
                num_stages=int(cells["num_stages"]),
                triton=cells["triton"],
                key=cells["key"],
                stage=cells["stage"],
            )
            for cells in reader
        ]


_COLUMNS = [
    *(field.name for field in fields(Label)),
    *(field.name for field in fields(Figures)),
    *("num_warps", "num_stages", "blocks_per_sm", "occupancy", "triton", "key", "stage"),
]


class Summary(NamedTuple):
    """The worst of each figure over all variants of a kernel on a GPU."""

    kernel: str
    target: str
    variants: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    faults: int


# The names of the summary's columns.
HEADINGS = ("kernel", "GPU", "variants", "registers", "spilled bytes", "shared bytes", "blocks per SM", "faults")


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each kernel and GPU."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.label.kernel, row.label.target), []).append(row)
    gpus = list(GPUS)
    return [
        Summary(
            kernel=kernel,
            target=target,
            variants=len(group),
            registers=max(row.figures.registers for row in group),
            spill_bytes=max(row.figures.spill_bytes for row in group),
            shared_bytes=max(row.figures.shared_bytes for row in group),
            blocks_per_sm=min(row.blocks_per_sm for row in group),
            faults=sum(len(faults(row)) for row in group),
        )
        for (kernel, target), group in sorted(groups.items(), key=lambda item: (item[0][0], gpus.index(item[0][1])))
    ]


def to_markdown(rows: Sequence[Row], name: str) -> str:
    """The summary as a page. ``name``: of the CSV with all rows."""
    versions = ", ".join(sorted({row.triton for row in rows}))
    lines = [
        "# What the kernels compile to",
        "",
        f"Triton {versions} compiled {len(rows)} kernels. Nothing ran on a GPU: these figures come from the binaries.",
        f"`make static` writes this page and [{name}]({name}), which has a line for each kernel.",
        "Each figure is the worst of all variants: the most registers and spilled bytes of a thread, the most shared",
        "memory of a block, and the fewest blocks that a multiprocessor holds at once.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"| --- | --- |{' ---: |' * (len(HEADINGS) - 2)}",
        *(f"| `{x.kernel}` | {x.target} | {' | '.join(map(str, x[2:]))} |" for x in summarize(rows)),
    ]
    return "\n".join(lines) + "\n"
