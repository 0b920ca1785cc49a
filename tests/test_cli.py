"""The command line: the demo and what it measures, the drawn pattern, bad arguments."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from strategies import cases

import lsg_attn.cli.doctor
import lsg_attn.cli.measure
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.cli.draw import GLOBAL, LOCAL, NOT_SEEN, PADDING, SPARSE, kinds_of_keys
from lsg_attn.cli.main import main
from lsg_attn.cli.measure import measure


def test_demo_prints_a_row_for_each_type(capsys, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("Fünf Wörter, oft genug wiederholt. " * 20, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(["demo", "--file", str(document), "--tokens", "520"])
    out, following = capsys.readouterr().out.split("Where to go next:\n")
    lines = out.splitlines()
    rows = {cells[1].strip(): cells for line in lines if len(cells := line.split("│")) == 8}
    assert set(rows) == set(SPARSITY_TYPES)
    for cells in rows.values():
        _, _, keys, error, seconds, _, speed, _ = (cell.strip() for cell in cells)
        assert 300 < float(keys) < 521
        assert 0 < float(error) < 1e-5
        assert float(seconds) > 0
        assert float(speed.rstrip("x")) > 0

    *commands, page = (line.strip().split("  ")[0] for line in following.splitlines())
    assert (Path(__file__).parents[1] / page).exists()
    assert len(commands) == 3
    for program, command, *_ in (line.split() for line in commands):
        assert program == "lsg-attn"
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_doctor_says_what_runs_and_finds_what_is_wrong(capsys, monkeypatch):
    main(["doctor", "--tokens", "300", "--head-dim", "24", "--dtype", "float64", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"{torch.__version__} " in out
    assert "takes 'torch':" in out
    assert "'cpp': the dtype is torch.float64, the C++ takes" in out
    assert "Self-check of torch against the reference in float64, 7 types, with gradients: all within" in out
    right = lsg_attn.cli.doctor.run_attention
    wrong = lambda *x, **named: {name: 1.01 * y for name, y in right(*x, **named).items()}  # noqa: E731
    monkeypatch.setattr(lsg_attn.cli.doctor, "run_attention", wrong)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cpu"])
    assert stop.value.code == 1
    assert "'torch', lsh: dvalue: relative RMS error 1.00e-02 is above 1e-05" in capsys.readouterr().out
    for arguments, message in (
        (["--device", "moon"], "--device: Expected one of cpu"),
        (["--heads", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["doctor", *arguments])
        assert message in capsys.readouterr().err


def test_measure_reports_the_last_result_the_fastest_repetition_and_the_peak(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(lsg_attn.cli.measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    numbers = iter(range(3))
    measured = measure(lambda: (next(numbers), torch.ones(25_000_000).sum().item()), repetitions=3)
    assert measured.result == (2, 25_000_000)
    assert measured.seconds == 1.0
    assert measured.peak is None or 90e6 < measured.peak.growth < 160e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--file", "no such file"], "No such file"),
        (["demo", "--tokens", "0"], "tokens: expected at least 1, got 0"),
        (["pattern", "--block-size", "6"], "must divide block_size"),
        (["pattern", "--padding", "99"], "0 <= num_padding <= num_tokens"),
        (["pattern", "--sparsity-type", "mean"], "invalid choice: 'mean'"),
        (["pattern", "--out", "pattern.svg"], "expected a file that ends in .png or .html, got pattern.svg"),
        (["pattern", "--out", "no such folder/pattern.html"], "No such file"),
        (["pattern", "--no-such"], "unrecognized arguments: --no-such"),
        (["bench"], "invalid choice: 'bench'"),
    ],
)
def test_bad_arguments_exit_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", [OSError, ValueError, ImportError])
def test_an_error_of_several_lines_becomes_one(kind, monkeypatch, capsys):
    def fail(*_):
        raise kind("no such model\n  at this place")

    monkeypatch.setattr("lsg_attn.cli.main.kinds_of_keys", fail)
    with pytest.raises(SystemExit):
        main(["pattern"])
    assert capsys.readouterr().err == "lsg-attn: no such model at this place\n"


def test_demo_refuses_an_empty_document(tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    with pytest.raises(SystemExit):
        main(["demo", "--file", str(tmp_path / "empty")])
    assert "has no tokens" in capsys.readouterr().err


def test_pattern_prints_a_letter_for_each_query_and_key(capsys):
    main(["pattern", "--tokens", "40", "--padding", "3", "--sparsity-type", "stride", "--num-global-tokens", "2"])
    lines = capsys.readouterr().out.splitlines()
    kinds = kinds_of_keys(LSGPattern(8, 8, 4, "stride", 2), 40, 3)
    assert lines[0] == "stride: B=8, s=8, f=4, G=2"
    assert lines[1:43] == ["".join("·GLSx"[kind] for kind in row) for row in kinds.tolist()]
    assert lines[10 + 1].startswith("GGLLLLLLLLLLLLLLLLLLLLLLLL")


def test_pattern_writes_a_png(tmp_path):
    out = tmp_path / "pattern.png"
    main(["pattern", "--sparsity-type", *SPARSITY_TYPES, "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG\r\n")


def test_pattern_without_matplotlib_names_the_extra_and_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("lsg_attn.cli.needs.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["pattern", "--out", str(tmp_path / "pattern.png")])
    assert "pip install 'lsg-attn[plot]'" in capsys.readouterr().err
    main(["pattern", "--out", str(tmp_path / "pattern.HTML")])
    assert (tmp_path / "pattern.HTML").read_text(encoding="utf-8").startswith("<!doctype html>")


@given(cases(types=("stride",)))
def test_drawn_kinds_match_the_windows(case):
    pattern, length, _ = case
    first, size = pattern.num_global_tokens, pattern.block_size
    num_tokens = length - first
    padding = num_tokens // 4
    kinds = kinds_of_keys(pattern, num_tokens, padding)
    block = (torch.arange(length) - first).div(size, rounding_mode="floor")
    near = (block[:, None] - block).abs() <= 1
    is_global = torch.zeros(length, length, dtype=torch.bool)
    is_global[:first] = is_global[:, :first] = True
    padded = torch.arange(length).expand(length, length) >= length - padding
    assert torch.equal(kinds == PADDING, padded)
    assert torch.equal(kinds == GLOBAL, is_global & ~padded)
    if pattern.is_dense(num_tokens):
        near[:] = True
    assert torch.equal(kinds == LOCAL, near & ~is_global & ~padded)
    position = torch.arange(length) - first  # head 0 of stride takes every f-th token
    slot = position // max(pattern.sparsity_factor, 1)
    left, right = (block[:, None] - 1) * pattern.step, (block[:, None] + 2) * pattern.step
    reach = pattern.sparse_block_size
    seen = ((slot >= left - reach) & (slot < left)) | ((slot >= right) & (slot < right + reach))
    chosen = position % max(pattern.sparsity_factor, 1) == 0
    dense = pattern.is_dense(num_tokens) or not pattern.has_sparse
    assert torch.equal(kinds == SPARSE, seen & chosen & ~is_global & ~padded & ~torch.tensor(dense))
    assert set(kinds.unique().tolist()) <= {NOT_SEEN, GLOBAL, LOCAL, SPARSE, PADDING}
