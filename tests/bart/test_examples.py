"""The examples and the demo, run from the command line."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import BASE, CONVERTED, NORM, seq2seq

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


@pytest.mark.parametrize("line", ['{"document": "one"}', "[1]", "not JSON"])
def test_finetune_refuses_bad_lines(line, tmp_path):
    """The error gives the line's number. Blank lines are skipped, and U+2028 does not end a line."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"document": "one\u2028more", "summary": "1"}\n\n' + line, encoding="utf-8")
    finetune = runpy.run_path(str(EXAMPLES / "finetune.py"))
    with pytest.raises(ValueError, match=r'data.jsonl:3: expected an object with the strings "document" and "summary"'):
        finetune["Summaries"](data, None, 10, 10)


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
