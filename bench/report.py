"""python -m bench.report: writes the README's performance section from the files in bench/results, figure by figure."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import OURS, OWN, TimedCase, ours_of
from bench.measure import BOUND
from bench.record import Run, read
from bench.table import pattern_label

_ROOT = Path(__file__).parent.parent
_README, _RESULTS = _ROOT / "README.md", _ROOT / "bench/results"
_BEGIN, _END = "<!-- begin: python -m bench.report -->\n", "<!-- end: python -m bench.report -->\n"
_WHO = {
    "lsg torch": "ours, PyTorch",
    "lsg triton": "ours, Triton",
    "lsg reference": "ours, the dense reference",
    "original": "the original",
    "flex": "FlexAttention, same mask",
    "dense": "dense attention",
    "longformer": "Longformer",
    "led": "LED",
    "bigbird": "BigBird",
    "bigbird_pegasus": "BigBirdPegasus",
    BOUND: "matmul bound",
}
_HEADS = {"types": "Sparsity types", "patterns": "Train step with other patterns", "dtypes": "Dtypes"}
Figure = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the section, or with --check fail where it is not what the files say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README would change")
    options = parser.parse_args(arguments)
    old = _README.read_text(encoding="utf-8")
    new = with_report(old, sorted(_RESULTS.glob("*.jsonl"), key=lambda path: path.stem))
    if options.check and new != old:
        raise SystemExit("README.md: the performance section is not that of bench/results; run python -m bench.report")
    if not options.check:
        _README.write_text(new, encoding="utf-8")


def with_report(readme: str, paths: Iterable[Path]) -> str:
    """The README's text with the section that belongs to these files.

    Raises:
        ValueError: the text has no such section, or a file is that of a dry run.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"README.md: expected a section from {_BEGIN.strip()!r} to {_END.strip()!r}")
    return before + begin + "\n".join(line for path in paths for line in report(path)) + "\n" + end + after


def report(path: Path) -> list[str]:
    """A run's file as Markdown.

    Raises:
        ValueError: it is that of a dry run.
    """
    run = read(path)
    if run.run["arguments"]["dry_run"]:
        raise ValueError(f"{path}: figures of a dry run say nothing")
    lines = [*_heading(path, run), *_peers(run, run.common_length()), *_lengths(run), *_patterns(run), *_kept(run)]
    lines += _faster(run)
    pictures = [f"{path.stem}-{name}.png" for name in ("ratios", "time", "memory")]
    for name in pictures:
        if (path.parent / name).exists():
            lines += [f"![{name}](bench/results/{name})", ""]
    return [*lines, *_skipped(run)]


def _heading(path: Path, run: Run) -> list[str]:
    what = run.run
    versions = ", ".join(f"{name} {version}" for name, version in what["versions"].items() if version)
    threads = f", {what['threads']} threads" if what["cuda"] is None else ""
    return [
        f"### {what['device']}{threads}: transformers {what['versions']['transformers']}",
        "",
        f"{what['date'][:10]}, commit {what['commit']}, {versions}; {len(run.figures)} figures in "
        f"[{path.name}](bench/results/{path.name}).",
        "",
    ]


def _peers(run: Run, middle: int) -> list[str]:
    """A row for each peer and a column for each section, all at one length."""
    columns: dict[str, dict[str, Figure]] = {}
    for figure in run.figures:
        if figure["case"].tokens == middle and figure["compares"] == "peers":
            columns.setdefault(_title(figure), {})[figure["peer"]] = figure
    names = [name for name in _WHO if any(name in column for column in columns.values())]
    head = (
        f"Time over ours at {middle:,} tokens: the median of repetitions, and in brackets the 20th and 80th "
        "percentiles; and the peak memory of the call over ours. Of ours, the amounts."
    )
    rows = {_WHO[name]: [_cell(x.get(name), _ours(x)) for x in columns.values()] for name in names}
    return [head, "", *_markdown(columns, rows)]


def _title(figure: Figure) -> str:
    case: TimedCase = figure["case"]
    batch = f" {case.batch} x {case.tokens}, {case.size.layers} layer{'s' * (case.size.layers > 1)}"
    section: str = figure["section"]
    return section + (batch if section == "train step" else "")


def _ours(column: dict[str, Figure]) -> Figure | None:
    return column.get(ours_of(column) or "")


def _cell(figure: Figure | None, ours: Figure | None) -> str:
    if figure is None:
        return ""
    peak, own = figure.get("peak_bytes"), (ours or {}).get("peak_bytes")
    if figure is ours or figure["ratio"] is None:
        return _time(figure["ms"][0]) + (f", {peak / 2**20:.0f} MiB" if peak else "")
    ratio, low, high = figure["ratio"]
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})" + (f", memory {peak / own:.1f}" if peak and own else "")


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def _lengths(run: Run) -> list[str]:
    """Dense attention's time over ours at each length, in each section that has several."""
    sections: dict[str, dict[int, Figure]] = {}
    for figure in run.figures:
        if figure["peer"] == "dense" and figure["compares"] == "peers" and figure["ratio"]:
            sections.setdefault(figure["section"], {})[figure["case"].tokens] = figure
    sections = {title: row for title, row in sections.items() if len(row) > 1}
    lengths = sorted({length for row in sections.values() for length in row})
    if not sections:
        return []
    head = "Dense attention's time over ours, by length (above 1, LSG is faster):"
    rows = {
        title: [f"{row[length]['ratio'][0]:.2f}" if length in row else "" for length in lengths]
        for title, row in sections.items()
    }
    return [head, "", *_markdown([f"{length:,}" for length in lengths], rows)]


def _markdown(columns: Iterable[str], rows: dict[str, list[str]]) -> list[str]:
    """A table whose rows have names."""
    names = list(columns)
    return [
        f"| | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        "",
    ]


def _patterns(run: Run) -> list[str]:
    """Rows of sparsity types, patterns and dtypes: our time, and that of others and of the bound over it."""
    lines: list[str] = []
    for compares, head in _HEADS.items():
        rows: dict[str, list[str]] = {}
        titles = dict.fromkeys(x["section"] for x in run.figures if x["compares"] == compares)
        found = {x["peer"] for x in run.figures if x["compares"] == compares}
        names = [name for name in _WHO if name in found and name not in OURS]
        for title in titles:
            for cases in _by_case(run, title):
                ours = _ours(cases)
                if ours is None:
                    continue
                row = rows.setdefault(_label(ours["case"], compares), [])
                row += [_time(ours["ms"][0]), *(_ratio(cases, name) for name in names)]
        if rows:
            others = [_WHO[name] for name in names]
            columns = [x for title in titles for x in (f"{title.split(', ')[-1]}, ours", *others)]
            lines += [f"{head}: our time, and others' over it.", "", *_markdown(columns, rows)]
    return lines


def _by_case(run: Run, title: str) -> Iterable[dict[str, Figure]]:
    cases: dict[TimedCase, dict[str, Figure]] = {}
    for figure in run.figures:
        if figure["section"] == title:
            cases.setdefault(figure["case"], {})[figure["peer"]] = figure
    return cases.values()


def _ratio(figures: dict[str, Figure], name: str) -> str:
    return f"{figures[name]['ratio'][0]:.2f}" if name in figures and figures[name]["ratio"] else ""


def _label(case: TimedCase, compares: str) -> str:
    if compares == "dtypes":
        return case.dtype_name
    return pattern_label(case.pattern) if compares == "patterns" else f"`{case.pattern.sparsity_type}`"


def _kept(run: Run) -> list[str]:
    """What is left where the allocator keeps freed memory."""
    lines = []
    for title in dict.fromkeys(x["section"] for x in run.figures if x["compares"] == "allocators"):
        for figures in _by_case(run, title):
            ratios = ", ".join(f"{_WHO[name]} {_ratio(figures, name)}" for name in figures if name not in OURS)
            lines.append(f"- {title.split(', ')[-1]}: {ratios}")
    if not lines:
        return []
    return [
        "glibc gives large freed blocks back to the system, and who allocates most pays for fetching them again. With "
        "an allocator that keeps them, as jemalloc does, the times over ours are instead:",
        "",
        *lines,
        "",
    ]


def _faster(run: Run) -> list[str]:
    """Who takes less time than ours, and where."""
    lines = []
    for figure in run.figures:
        if figure["peer"] not in (BOUND, *OWN) and figure["ratio"] and figure["ratio"][0] < 1:
            case: TimedCase = figure["case"]
            where = f"{figure['section']}, {case.tokens:,} tokens, {case.dtype_name}"
            lines.append(f"- {_WHO[figure['peer']]}: {where}: {figure['ratio'][0]:.2f}")
    return ["Who is faster than ours, and where:", "", *lines, ""] if lines else []


def _skipped(run: Run) -> list[str]:
    reasons: dict[str, dict[str, None]] = {}
    for record in run.skipped:
        reasons.setdefault(f"{_WHO[record['peer']]}: {record['reason']}", {})[record["section"]] = None
    lines = [f"- {reason} ({'; '.join(sections)})" for reason, sections in reasons.items()]
    return ["<details><summary>Who did not run what, and why</summary>", "", *lines, "", "</details>", ""]


if __name__ == "__main__":
    main()
