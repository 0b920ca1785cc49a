"""The examples and the demo, run from the command line."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from checkpoints import BASE, CONVERTED, NORM, seq2seq
from transformers import AutoTokenizer, GenerationConfig

from lsg_attn.bart import LSGBartConfig, LSGBartForConditionalGeneration
from lsg_attn.cli.main import main
from lsg_attn.cli.sizes import BART_SIZES, Size

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 60


def run(name, *arguments, status=0):
    """Run an example and return its output from stdout and stderr."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize(("model", "limit", "length"), [(CONVERTED, 2048, None), (BASE, 1500, 1500)])
def test_summarize(model, limit, length, document):
    arguments = ["--model", model, "--max-new-tokens", "8", "--num-beams", "2", "--device", "cpu"]
    out = run("summarize.py", document, *arguments, *(["--max-length", length] if length else []))
    assert re.search(rf"reading {limit} of (\d+) tokens, the rest is left out", out)
    assert re.search(r"read at \d+ tokens/s, wrote [1-8] tokens at [\d.]+ tokens/s", out)
    assert ("plain BART: converting it for 1500 tokens" in out) is (model == BASE)


def test_summarize_refuses_more_tokens_than_the_model_reads(document):
    out = run("summarize.py", document, "--model", CONVERTED, "--max-length", "3000", status=2)
    assert f"--max-length: expected at most 2048, the length of {CONVERTED}, got 3000" in out


@pytest.mark.parametrize("name", ["summarize.py", "finetune.py"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(name, content, tmp_path):
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_bytes(content)
    out = run(name, path, "--model", CONVERTED, *(["--output", tmp_path / "out"] if "fine" in name else []), status=2)
    assert f"expected a text file in UTF-8 at {path}: " in out
    assert "Traceback" not in out


def test_finetune_lowers_the_loss_and_saves(tmp_path):
    """The saved model loads and has changed. A plain BART is refused."""
    data = tmp_path / "data.jsonl"
    examples = [{"document": f"{TEXT[:400]} number {i}", "summary": f"fox {i}"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, examples)))
    arguments = ["--model", CONVERTED, "--output", tmp_path / "tuned", "--gradient-checkpointing"]
    out = run("finetune.py", data, *arguments, "--epochs", "10", "--batch-size", "2", "--learning-rate", "1e-3")
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", out)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    tuned = seq2seq(tmp_path / "tuned")
    assert type(tuned) is LSGBartForConditionalGeneration
    before = seq2seq(CONVERTED).model.encoder.global_embeddings.weight
    assert not torch.equal(tuned.model.encoder.global_embeddings.weight, before)
    out = run("finetune.py", data, "--model", BASE, "--output", tmp_path / "plain", status=2)
    assert f"--model: expected an LSG-BART, got {BASE}; `lsg-attn convert` converts a BART" in out


@pytest.fixture
def start(monkeypatch):
    """A function that runs an example in this process, as a program or under another ``name``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(program, *arguments, name="__main__"):
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / program), run_name=name)

    yield run
    sys.modules.pop("pairs", None)


@pytest.mark.parametrize("line", ['{"document": "one"}', "[1]", "not JSON", '{"document": "one", "summary": 1}'])
@pytest.mark.parametrize("name", ["finetune.py", "evaluate.py"])
def test_bad_lines_are_refused(name, line, tmp_path, start, capsys):
    """The error gives the line's number. Blank lines are skipped, and U+2028 does not end a line."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"document": "one\u2028more", "summary": "1"}\n\n' + line, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        start(name, data, "--model", CONVERTED, *(["--output", tmp_path] if name == "finetune.py" else []))
    assert stop.value.code == 2
    message = f'{data}:3: expected an object with the strings "document" and "summary", got {line}\n'
    assert capsys.readouterr().err.endswith(message)


def documents(path, document, summary):
    """A file of a dozen documents, with summaries, made of Python's help."""
    names = sorted(topics, key=lambda name: len(topics[name]))[-12:]
    lines = ({document: topics[name], summary: f"How {name} works.", "name": name} for name in names)
    path.write_text("\n".join(map(json.dumps, lines)))
    return [topics[name] for name in names]


def test_evaluate(tmp_path, start, capsys):
    """What it writes are the model's summaries; what it prints comes from them."""
    texts = documents(tmp_path / "data.jsonl", "article", "abstract")
    arguments = ["--model", CONVERTED, "--document", "article", "--summary", "abstract", "--device", "cpu"]
    arguments += ["--max-length", "900", "--max-new-tokens", "12", "--num-beams", "2", "--batch-size", "5"]
    start("evaluate.py", tmp_path / "data.jsonl", *arguments, "--out", tmp_path / "out.jsonl")
    out = capsys.readouterr().out
    assert "12 documents of up to 900 tokens, batches of 5, torch.float32, cpu" in out
    assert "num_beams=2, max_new_tokens=12\n" in out
    assert re.findall(r"^(\d+) of 12, ", out, re.MULTILINE) == ["5", "10", "12"]
    assert "12 of 12 documents are longer than 900 tokens, their rest was left out" in out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = seq2seq(CONVERTED), AutoTokenizer.from_pretrained(CONVERTED)
    for text, line in zip(texts, lines, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=900, return_tensors="pt")
        (ids,) = model.generate(**inputs, max_new_tokens=12, num_beams=2)
        assert line["prediction"] == tokenizer.decode(ids, skip_special_tokens=True)
    rows = re.findall(r"^(rouge\w+) +([\d.]+)  \[([\d.]+), ([\d.]+)\]$", out, re.MULTILINE)
    assert [kind for kind, *_ in rows] == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for kind, *bounds in rows:
        low, median, high = map(float, bounds)
        mean = 100 * sum(line[kind] for line in lines) / 12
        assert low <= median <= high
        assert low - 0.01 <= mean <= high + 0.01


def test_rouge_is_what_is_computed_by_hand(start):
    """The words are the same. 4 of 7 pairs are; 6 words are in the same order; sentence by sentence it is 7 words."""
    rouge = start("evaluate.py", name="evaluate")["Rouge"]()
    scores = rouge.add("The cat sat on the mat. It slept.", "The cat slept. On the mat it sat.")
    assert scores == pytest.approx({"rouge1": 1, "rouge2": 4 / 7, "rougeL": 6 / 8, "rougeLsum": 7 / 8})
    assert rouge.add("The cat sat on the mat.\nIt slept.", "The cat slept.\nOn the mat it sat.") == scores
    assert rouge.add("It stops, stopping", "it stopped") == pytest.approx(
        {**dict.fromkeys(scores, 0.8), "rouge2": 2 / 3}
    )
    assert rouge.add("no. no.", "no no")["rougeLsum"] == 1
    assert rouge.add("no no", "no. no.")["rougeLsum"] == 0.5  # both sentences have the same word of the reference
    assert rouge.intervals() == rouge.intervals()
    rouge = start("evaluate.py", name="evaluate")["Rouge"]()
    rouge.add("one word", "one word")
    rouge.add("one word", "")
    # of two documents with 1 and 0, samples have the means 0, 0.5 and 1, a quarter, a half and a quarter of them
    assert rouge.intervals() == dict.fromkeys(scores, (0, 0.5, 1))


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({}, (None, None), {"num_beams": 1, "max_new_tokens": 256}),
        ({"max_length": 320, "num_beams": 5, "length_penalty": 2.0}, (None, None), {}),
        ({"max_length": 320, "num_beams": 5}, (64, 2), {"num_beams": 2, "max_new_tokens": 64}),
        ({"max_new_tokens": 100, "no_repeat_ngram_size": 3}, (None, None), {"num_beams": 1}),
    ],
)
def test_evaluate_generates_with_the_generation_config(config, options, expected, start):
    settings_of = start("evaluate.py", name="evaluate")["settings_of"]
    model = SimpleNamespace(generation_config=GenerationConfig(**config, temperature=0.5, do_sample=True))
    kept = {key: x for key, x in config.items() if key != "max_length" or options[0] is None}
    assert settings_of(model, *options) == {**kept, **expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--summary", "abstract"], 'data.jsonl:1: expected an object with the strings "document" and "abstract"'),
        (["--model", str(BASE)], f"--model: expected an LSG encoder-decoder, got {BASE}; see `lsg-attn convert`"),
        (["--model", "./nowhere"], "./nowhere"),
        (["--max-length", "3000"], f"--max-length: expected at most 2048, the length of {CONVERTED}, got 3000"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--out", "data.jsonl"], "--out: expected a file that can be made, got data.jsonl: File exists"),
    ],
)
def test_evaluate_refuses_bad_arguments(arguments, message, tmp_path, start, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"document": "one", "summary": "1"}')
    with pytest.raises(SystemExit) as stop:
        start("evaluate.py", "data.jsonl", "--model", CONVERTED, "--device", "cpu", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def rows_of(out):
    """The demo's table: seconds and GiB of each step."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {name: (float(seconds), peak) for name, seconds, peak in cells}


@pytest.mark.parametrize("model", [NORM, BASE])
def test_demo_with_a_model(model, document, capsys, tmp_path):
    if model == NORM:  # it has no tokenizer, so another LSG-BART takes its place
        main(["convert", str(CONVERTED), str(tmp_path / "lsg"), "--max-length", "1024"])
        model = tmp_path / "lsg"
    main(["demo", "--model", str(model), "--file", str(document), "--tokens", "700"])
    out = capsys.readouterr().out
    assert "700 tokens" in out
    assert "generated:" in out
    assert list(rows_of(out)) == ["load", "forward", "generate 16 tokens"]


def test_demo_with_a_size(document, capsys, monkeypatch):
    monkeypatch.setitem(BART_SIZES, "base", Size(width=32, layers=2, heads=4, feed_forward=48))
    main(["demo", "--size", "base", "--file", str(document), "--tokens", "600"])
    out = capsys.readouterr().out
    assert "random weights" in out
    rows = rows_of(out)
    assert list(rows) == ["build", "forward", "generate 16 tokens"]
    assert all(seconds > 0 and (peak == "n/a" or float(peak) > 0.05) for seconds, peak in rows.values())
    (generated,) = re.findall(r"generated: \[([\d, \n]*)\]", out)
    assert len(generated.split(",")) == 17  # the decoder's start token and 16 new tokens


def test_large_is_the_default_size_of_bart():
    config = LSGBartConfig()  # the default values are those of BART-large
    assert BART_SIZES["large"] == Size(
        config.d_model,
        config.encoder_layers,
        config.encoder_attention_heads,
        config.encoder_ffn_dim,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", str(CONVERTED)], "expected at most max_position_embeddings=2048 tokens, got 4096"),
        (["--model", str(NORM)], "which has none of tokenizer.json, vocab.json"),
        (["--size", "base", "--tokens", "2"], "tokens: expected at least 3, got 2"),
        (["--size", "base", "--model", str(BASE)], "not allowed with argument"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
