"""bench.quality from its files: intervals, a run that goes on, and the committed page and picture."""

import json
import random
import re

import numpy as np
import pytest

from bench.quality import __main__ as command
from bench.quality import intervals, page
from bench.quality.figures import LATE, TITLE, Figures, difference, recall_at, reciprocal
from bench.quality.plot import draw, speed
from bench.quality.results import FOLDER, Results, read_rows, read_run
from bench.quality.retrieval import BASELINES, SHORT, short_texts
from bench.quality.settings import BLOCKS, DENSE, FACTORS, TYPES, Setting, grid, settings
from lsg_attn import SPARSITY_TYPES, LSGPattern

PAGE = FOLDER.parent.parent.parent / "docs/quality.md"
DOCUMENTS = 30
EMPTY = "".join(mark for section in ("in short", "tables") for mark in page.marks(section))
TRAINED = "norm 128 f2, 8 global tokens, first token kept, plain questions, trained"


@pytest.fixture
def folder(tmp_path):
    """Results of no model: documents that are found the better, the larger the block; published figures as they are."""
    generator = random.Random(0)
    late = [generator.randint(1, 6) for _ in range(DOCUMENTS)]
    names = [f"{('help', 'module', 'numpy')[i % 3]}: {i}" for i in range(DOCUMENTS)]
    arguments = {"documents": names, "late": late, "tokens": [1500] * DOCUMENTS, "digest": "0"}

    def ranks(count, worst):
        return [generator.randint(0, worst) for _ in range(count)]

    def retrieval(label, worst, cosines):
        found = {"cosine": [0.9] * DOCUMENTS, "title": ranks(DOCUMENTS, worst), "late": ranks(sum(late), worst)}
        return {"label": label, **found, **{f"cosine_{n}": [0.99] * len(short_texts(DOCUMENTS)) for n in cosines}}

    made = [retrieval(label, 6, ()) for label in BASELINES]
    made += [retrieval(x.label, 1 + 512 // min(x.block_size, 256), SHORT) for x in settings()]
    training = {"documents": 9, "max_length": 2000, "epochs": 3, "losses": [0.5, 0.4, 0.25]}
    made.append({**retrieval(TRAINED, 0, SHORT), "training": training})
    costs = [{"label": x, "ms": [9.0] * 3, "ratio": [1.0] * 3, "peak_bytes": 1 << 20} for x in BASELINES]
    kept = []
    for setting in [DENSE, *grid()]:
        costs.append({**costs[0], "label": setting.label, "ratio": [setting.block_size / 100] * 3})
        kept.append({"label": setting.label, "seen": 0.25, "covered": 0.5, "error": 0.1})
    for part, rows, about in (("retrieval", made, arguments), ("kept", kept, arguments), ("cost", costs, {})):
        results = Results(tmp_path / f"{part}.jsonl", about)
        for row in rows:
            results.add(row)
        results.close()
    (tmp_path / "published.csv").write_bytes((FOLDER / "published.csv").read_bytes())
    return tmp_path


def test_grid_has_every_pattern_that_exists():
    expected = set()
    for name in SPARSITY_TYPES:
        for block in (32, 64, 128, 256):
            for factor in (2, 4, 8, 16) if name != "none" else (0,):
                expected.add(LSGPattern(block, block, factor, name))
    assert {setting.pattern for setting in grid()} == expected
    assert len(grid()) == len(expected) == len(TYPES) * len(BLOCKS) * len(FACTORS) + len(BLOCKS)
    assert len({setting.label for setting in settings()}) == len(settings())
    assert all(setting.mask_first_token for setting in grid())
    assert DENSE.pattern.is_dense(4096)


def test_interval_of_independent_values_is_that_of_their_mean():
    """One question for each document: the standard error of a mean, as theory has it."""
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    weights = intervals.resample(len(values))
    value, low, high = intervals.interval(intervals.means(weights, values, range(len(values))))
    assert value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(value - half, abs=0.1 * half), pytest.approx(value + half, abs=0.1 * half))
    assert np.array_equal(weights, intervals.resample(len(values)))
    assert (weights.sum(1) == len(values)).all()


def test_questions_of_a_document_are_drawn_together():
    """Ten equal answers to each document tell no more than one. Values weigh alike, not documents."""
    values = np.random.default_rng(1).normal(size=100)
    weights = intervals.resample(100)
    once = intervals.interval(intervals.means(weights, values, range(100)))
    tenfold = intervals.interval(intervals.means(weights, np.repeat(values, 10), np.repeat(np.arange(100), 10)))
    assert tenfold == pytest.approx(once)
    assert intervals.means(np.array([[1, 1], [2, 1]]), [1, 1, 1, 0], [0, 0, 0, 1]).tolist() == [3 / 4, 6 / 7]


def test_paired_differences_are_sharper(folder):
    """A row that is a little better in every document differs, however much documents do."""
    figures = Figures(folder)
    hard = np.random.default_rng(2).uniform(0, 1, DOCUMENTS)
    left, right = (intervals.means(figures._weights, hard + x, range(DOCUMENTS)) for x in (0.01, 0))
    assert intervals.interval(left).low < intervals.interval(right).high
    assert difference(left, right) == pytest.approx((0.01, 0.01, 0.01))
    assert difference(left, right).is_different
    assert not difference(left, left).is_different
    assert difference(right, left).is_different


def test_figures_of_ranks(folder):
    figures, row = Figures(folder), next(read_rows(folder / "retrieval.jsonl"))
    label = row["label"]
    expected = {task: np.mean([1 / (1 + rank) for rank in row[task]]) for task in (TITLE, LATE)}
    assert figures.task(label, LATE, reciprocal)[0] == pytest.approx(expected[LATE])
    assert figures.task(label, TITLE, recall_at(1))[0] == pytest.approx(np.mean([rank == 0 for rank in row[TITLE]]))
    assert figures.task(label, TITLE, recall_at(5))[0] == pytest.approx(np.mean([rank <= 4 for rank in row[TITLE]]))
    assert figures.score(label)[0] == pytest.approx((expected[TITLE] + expected[LATE]) / 2)
    assert figures.questions(LATE) == len(row[LATE])
    assert figures.cosine(label, "cosine_512") is None
    assert figures.cosine(DENSE.label, "cosine_512").value == pytest.approx(0.99)


def test_a_stopped_run_goes_on(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    results = Results(path, {"digest": "a"})
    results.add({"label": "first", "x": [1]})
    results.close()
    whole = path.read_text()
    path.write_text(whole + '{"kind": "row", "label": "second", "x": [')  # stopped while it wrote
    results = Results(path, {"digest": "a"})
    assert results.labels == {"first"}
    results.add({"label": "second", "x": [2]})
    results.close()
    assert path.read_text().startswith(whole)
    assert list(read_rows(path)) == [{"label": "first", "x": [1]}, {"label": "second", "x": [2]}]
    with pytest.raises(ValueError, match=r"expected rows with arguments \{'digest': 'b'\}, got \{'digest': 'a'\}"):
        Results(path, {"digest": "b"})
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(ValueError, match="expected rows with versions"):
        Results(path, {"digest": "a"})
    path.write_text("")
    with pytest.raises(ValueError, match="expected the file of one run, got 0"):
        read_run(path)


def test_page_says_what_the_rows_say(folder):
    text = page.with_figures(EMPTY, folder)
    lines = text.splitlines()
    figures = Figures(folder)
    of_type = {name: [x.label for x in grid() if x.sparsity_type == name] for name in SPARSITY_TYPES}
    ordered = sorted(of_type, key=lambda name: figures.mean_score(of_type[name])[0], reverse=True)
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Which block")[0], re.MULTILINE) == ordered
    assert f"**`{ordered[0]}` has the highest score" in text
    assert f"- **Types**: `{ordered[0]}` has the highest score, `{ordered[-1]}` the lowest; they differ by " in text
    assert "- **Block sizes**: B = 256 has the highest score, B = 32 the lowest; they differ by **+" in text
    blocks = [line for line in lines if line.startswith("| B = ")]
    assert [line.split(" |")[0] for line in blocks] == ["| B = 32", "| B = 64", "| B = 128", "| B = 256"]
    assert [line.split(" | ")[2][:3] for line in blocks] == ["**\N{MINUS SIGN}", "**\N{MINUS SIGN}", "the", "**+"]
    assert "256 f" in text.split("has the highest score of a single conversion")[0].splitlines()[-1]
    assert all(f"| {setting.label} | " in text for setting in settings())
    assert f"{DOCUMENTS} documents: 10 topics of Python's help, 10 modules" in text
    assert "on 9 documents of at most 2,000 tokens, for 3 epochs" in text
    assert (
        "from 0.500 in the first epoch to 0.250 in the last. Against the untrained tokens the score differs by **+"
        in text
    )
    assert "| 25 % | 50 % | 0.10 | 0.64 (0.64 to 0.64) | 1 |" in text  # a row
    assert "| 25 % | 50 % | 0.10 | 1.20 | 1 |" in text  # a type: the mean of 0.32, 0.64, 1.28 and 2.56
    assert "46.29 | 18.71 | 41.85" in text
    name = "lsg-bart-base-16384-pubmed"
    assert f"lsg-attn convert ccdv/{name} {name} --max-length 16384 --num-global-tokens 64 --block-size 256" in text
    assert text.count("--model lsg-bart-base-4096-arxiv\n") == 1  # of two rows
    path = folder / "retrieval.jsonl"
    path.write_text(path.read_text().replace('"title": [0, ', '"title": [25, '))
    assert page.with_figures(text, folder) != text


def test_plot_needs_every_time(folder):
    draw(Figures(folder), folder / "quality.png")
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert speed(Figures(folder), Setting("lsh", 64, 8)) == 0.64
    path = folder / "cost.jsonl"
    path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if "stride 64 f4" not in x))
    with pytest.raises(ValueError, match="expected a time of 'stride 64 f4', got none"):
        draw(Figures(folder), folder / "quality.png")


def test_errors_of_the_command(tmp_path, capsys, folder):
    assert command.main(["--page", str(PAGE), "--folder", str(tmp_path / "none")]) == 2
    assert "bench.quality: [Errno 2]" in capsys.readouterr().err
    (folder / "page.md").write_text("no marks")
    assert command.main(["--page", str(folder / "page.md"), "--folder", str(folder)]) == 2
    assert "expected a section from" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command.main(["--settings", "norm 128 f3"])
    assert stop.value.code == 2
    assert "got norm 128 f3" in capsys.readouterr().err


def test_command_writes_page_and_picture(folder):
    copy = folder / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    picture = folder / "picture.png"
    assert command.main(["--page", str(copy), "--plot", str(picture), "--folder", str(folder)]) == 0
    assert picture.exists()
    text = copy.read_text(encoding="utf-8")
    assert f"{page.marks('in short')[0]}## In short\n" in text
    assert f"{page.marks('tables')[0]}## Which sparsity type?\n" in text
    assert text.startswith("# Quality without training\n")
    assert text.endswith(PAGE.read_text(encoding="utf-8")[-200:])


def test_the_committed_page_is_made_of_the_committed_files():
    text = PAGE.read_text(encoding="utf-8")
    assert page.with_figures(text, FOLDER) == text
    run = read_run(FOLDER / "retrieval.jsonl")
    assert not run["commit"].endswith("-dirty")
    rows = {json.dumps(row["label"]) for row in read_rows(FOLDER / "retrieval.jsonl")}
    assert rows >= {json.dumps(setting.label) for setting in settings()}
