"""python -m bench.report: writes the figures of README.md and docs/performance.md from the files in bench/results."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import peers
from bench.cases import OURS, OWN, TimedCase, ours_of, plan
from bench.flops import BOUNDS, LARGE, PRODUCTS_ALONE
from bench.record import Run, read
from bench.table import pattern_label

_ROOT = Path(__file__).parent.parent
README, PAGE = _ROOT / "README.md", _ROOT / "docs/performance.md"
_RESULTS, _PLOTS = _ROOT / "bench/results", _ROOT / "docs/performance"
_BEGIN, _END = "<!-- begin: python -m bench.report -->\n", "<!-- end: python -m bench.report -->\n"
_WHO = {**peers.LABELS, PRODUCTS_ALONE: "the products alone", LARGE: "one large product"}
_HEADS = {"types": "Sparsity types", "patterns": "Train step with other patterns", "dtypes": "Dtypes"}
_PICTURES = {
    "ratios": "Time relative to ours, by peer",
    "time": "Time against sequence length",
    "memory": "Peak memory against sequence length",
}
Figure = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sections, or with --check fail if a section is not what the files give."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a section would change")
    options = parser.parse_args(arguments)
    paths = sorted(_RESULTS.glob("*.jsonl"), key=lambda path: path.stem)
    for document, lines in ((README, summary(paths)), (PAGE, [line for path in paths for line in report(path)])):
        old = document.read_text(encoding="utf-8")
        new = with_section(old, lines)
        if options.check and new != old:
            raise SystemExit(f"{document.name}: its figures differ from bench/results; run python -m bench.report")
        if not options.check:
            document.write_text(new, encoding="utf-8")


def with_section(text: str, lines: Iterable[str], marks: tuple[str, str] = (_BEGIN, _END)) -> str:
    """A document's text with these lines between its marks.

    Raises:
        ValueError: the text has no such section.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"expected a section from {marks[0].strip()!r} to {marks[1].strip()!r}")
    return before + begin + "\n".join(lines) + "\n" + end + after


def summary(paths: Iterable[Path]) -> list[str]:
    """A small table for a CPU and one for a GPU, of the sections of a quick run; each from the newest run of peers.

    Raises:
        ValueError: a file is that of a dry run.
    """
    newest: dict[bool, Run] = {}
    for run in map(_read, paths):
        is_gpu = run.run["cuda"] is not None
        if _compares_peers(run) and (is_gpu not in newest or run.run["date"] > newest[is_gpu].run["date"]):
            newest[is_gpu] = run
    return [line for run in newest.values() for line in _small_table(run)]


def _compares_peers(run: Run) -> bool:
    return any(figure["compares"] == "peers" for figure in run.figures)


def _small_table(run: Run) -> list[str]:
    tokens, device = run.common_length(), "cpu" if run.run["cuda"] is None else "cuda"
    titles = [section.title for section in plan(device, quick=True)]
    found = _at_length(run, tokens)
    columns = {title: figures for title, figures in found.items() if next(iter(figures.values()))["section"] in titles}
    shown = [name for name in _WHO if name not in (*BOUNDS, "lsg reference")]
    names = [name for name in shown if any(name in column for column in columns.values())]
    rows = {_WHO[name]: [_small_cell(x.get(name), _ours(x)) for x in columns.values()] for name in names}
    faster = dict.fromkeys(_WHO[figure["peer"]] for figure in _faster_figures(run))
    note = f" Faster than ours in some measured cases: {'; '.join(faster)}." if faster else ""
    return [
        f"{_where(run)}, {tokens:,} tokens: time relative to ours and, in brackets, peak memory relative to ours. "
        f"Our rows give absolute values.{note}",
        "",
        *_markdown(columns, rows),
    ]


def _small_cell(figure: Figure | None, ours: Figure | None) -> str:
    if figure is None:
        return ""
    peak, own = figure.get("peak_bytes"), (ours or {}).get("peak_bytes")
    if figure is ours or figure["ratio"] is None:
        return _time(figure["ms"][0]) + (f" ({peak / 2**20:.0f} MiB)" if peak else "")
    return f"{figure['ratio'][0]:.2f}" + (f" ({peak / own:.1f})" if peak and own else "")


def report(path: Path) -> list[str]:
    """A run's file as Markdown.

    Raises:
        ValueError: it is that of a dry run.
    """
    run = _read(path)
    lines = [*_heading(path, run), *(_peers(run, run.common_length()) if _compares_peers(run) else ())]
    lines += [*_lengths(run), *_patterns(run), *_kept(run)]
    lines += [*_long(run), *_faster(run)]
    for name, caption in _PICTURES.items():
        picture = f"{path.stem}-{name}.png"
        if (_PLOTS / picture).exists():
            lines += [f"![{caption}]({_PLOTS.name}/{picture})", ""]
    return [*lines, *_skipped(run)]


def _read(path: Path) -> Run:
    run = read(path)
    if run.run["arguments"]["dry_run"]:
        raise ValueError(f"{path}: figures of a dry run say nothing")
    return run


def _heading(path: Path, run: Run) -> list[str]:
    what = run.run
    only = f", {what['arguments']['only']}" if what["arguments"]["only"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in what["versions"].items() if version)
    return [
        f"## {_where(run)}: transformers {what['versions']['transformers']}{only}",
        "",
        f"{what['date'][:10]}, commit {what['commit']}, {versions}; {len(run.figures)} figures in "
        f"`bench/results/{path.name}`.",
        "",
    ]


def _where(run: Run) -> str:
    threads = f", {run.run['threads']} threads" if run.run["cuda"] is None else ""
    return f"{run.run['device']}{threads}"


def _peers(run: Run, middle: int) -> list[str]:
    """A row for each peer and a column for each section, all at one length."""
    columns = _at_length(run, middle)
    names = [name for name in _WHO if any(name in column for column in columns.values())]
    head = (
        f"At {middle:,} tokens, relative to ours: the median time over repetitions, its 20th and 80th percentiles in "
        "brackets, and the peak memory of the call. Our rows give absolute values."
    )
    rows = {_WHO[name]: [_cell(x.get(name), _ours(x)) for x in columns.values()] for name in names}
    return [head, "", *_markdown(columns, rows)]


def every_case(run: Run) -> list[str]:
    """A row for each case of the sections that compare peers, then what was not measured."""
    found = [x for x in run.figures if x["compares"] == "peers"]
    names = [name for name in _WHO if any(x["peer"] == name for x in found)]
    rows = {}
    for title in dict.fromkeys(x["section"] for x in found):
        for figures in _by_case(run, title):
            case: TimedCase = next(iter(figures.values()))["case"]
            rows[f"{title}, {case.tokens:,} tokens"] = [_cell(figures.get(name), _ours(figures)) for name in names]
    head = "Time relative to ours, 20th and 80th percentiles in brackets; above 1, ours is faster."
    table = [head, "", *_markdown((_WHO[name] for name in names), rows)] if rows else ["No case was measured.", ""]
    return [*table, *_skipped(run)]


def _at_length(run: Run, tokens: int) -> dict[str, dict[str, Figure]]:
    """The figures of each section that compares peers, by peer, at one length."""
    columns: dict[str, dict[str, Figure]] = {}
    for figure in run.figures:
        if figure["case"].tokens == tokens and figure["compares"] == "peers":
            columns.setdefault(_title(figure), {})[figure["peer"]] = figure
    return columns


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
    head = "Time of dense attention relative to ours, by length. Above 1, LSG is faster."
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
    """Rows of sparsity types, patterns and dtypes: our time, then peers and the bound relative to it."""
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
            lines += [f"{head}: our time, then the peers' time relative to it.", "", *_markdown(columns, rows)]
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
        return f"{case.dtype_name}, {case.tokens:,} tokens"
    return pattern_label(case.pattern) if compares == "patterns" else f"`{case.pattern.sparsity_type}`"


def _kept(run: Run) -> list[str]:
    """Ratios with an allocator that keeps freed memory."""
    lines = []
    for title in dict.fromkeys(x["section"] for x in run.figures if x["compares"] == "allocators"):
        for figures in _by_case(run, title):
            ratios = ", ".join(f"{_WHO[name]} {_ratio(figures, name)}" for name in figures if name not in OURS)
            lines.append(f"- {title.split(', ')[-1]}: {ratios}")
    if not lines:
        return []
    return [
        "glibc returns large freed blocks to the system, and a peer that allocates much pays to fetch them again. With "
        "an allocator that keeps freed blocks, as jemalloc does, times relative to ours are:",
        "",
        *lines,
        "",
    ]


def _long(run: Run) -> list[str]:
    """Time per token at lengths that few peers are measured at."""
    found = [figure for figure in run.figures if figure["compares"] == "lengths" and figure["peer"] not in BOUNDS]
    lengths = sorted({figure["case"].tokens for figure in found})
    rows: dict[str, list[str]] = {}
    for figure in sorted(found, key=lambda figure: figure["case"].tokens):
        rows.setdefault(_WHO[figure["peer"]], []).append(f"{figure['us_per_token']:.3g} us")
    head = "Time per token, forward, by length."
    return [head, "", *_markdown([f"{length:,}" for length in lengths], rows)] if rows else []


def _faster_figures(run: Run) -> list[Figure]:
    """The figures of peers that take less time than ours."""
    return [x for x in run.figures if x["peer"] not in (*BOUNDS, *OWN) and x["ratio"] and x["ratio"][0] < 1]


def _faster(run: Run) -> list[str]:
    """Each case in which a peer takes less time than ours."""
    lines = []
    for figure in _faster_figures(run):
        case: TimedCase = figure["case"]
        where = f"{figure['section']}, {case.tokens:,} tokens, {case.dtype_name}"
        lines.append(f"- {_WHO[figure['peer']]}: {where}: {figure['ratio'][0]:.2f}")
    return ["Peers that are faster than ours:", "", *lines, ""] if lines else []


def _skipped(run: Run) -> list[str]:
    reasons: dict[str, dict[str, None]] = {}
    for record in run.skipped:
        reasons.setdefault(f"{_WHO[record['peer']]}: {record['reason']}", {})[record["section"]] = None
    lines = [f"- {reason} ({'; '.join(sections)})" for reason, sections in reasons.items()]
    return ["Not measured:", "", *lines, ""] if lines else []


if __name__ == "__main__":
    main()
