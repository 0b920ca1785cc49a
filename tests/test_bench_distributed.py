"""bench.distributed: a run of two processes, and how the table reckons scaling."""

import re
from pathlib import Path

import pytest
import torch

from bench import distributed
from bench.record import records
from bench.static.ranks import Attention, context_parallel
from lsg_attn import LSGPattern
from lsg_attn.sections import shares


def test_quick_run_receives_what_the_model_says(tmp_path, capsys):
    path, pattern = tmp_path / "run.jsonl", LSGPattern(sparsity_type="bos_pooling")
    sizes = ["--tokens", "1100", "--ranks", "2", "--heads", "2", "--head-dim", "8", "--dtype", "bfloat16"]
    distributed.main(["--quick", "--backward", "--type", "bos_pooling", *sizes, "--out", str(path)])
    spans = [span.size for span in shares(1100, 2, pattern.block_size)]
    attention = Attention(pattern, 1, 2, 2, 8, torch.bfloat16)
    expected = [context_parallel(attention, spans, rank) for rank in range(2)]
    forward, both = records(path, "distributed")
    for record, traffic in (
        (forward, [x.forward for x in expected]),
        (both, [x.forward + x.backward for x in expected]),
    ):
        assert record["received_bytes"] == [x.received_bytes for x in traffic]
        assert record["messages"] == [x.messages for x in traffic]
        assert min(record["ms"]) > 0
        assert len(record["peak_bytes"]) == 2
    assert [x["step"] for x in (forward, both)] == list(distributed.STEPS)
    assert "one thread for each rank" in capsys.readouterr().out


def test_scaling_is_relative_to_as_many_cores_as_there_are():
    """Of two cores: four ranks are ideal at half the time of one rank, or with as many tokens each at twice that."""
    same = {"step": "forward", "sparsity_type": "norm", "received_bytes": [0], "messages": [0], "peak_bytes": [None]}
    seconds = {(100, 1): 80.0, (100, 2): 50.0, (100, 4): 40.0, (400, 4): 200.0}
    table = distributed.table_of(
        [{**same, "tokens": n, "ranks": ranks, "ms": (ms, ms, ms)} for (n, ranks), ms in seconds.items()], cores=2
    )
    assert [*table.columns[4].cells] == ["1.00", "0.80", "1.00", ""]
    assert [*table.columns[5].cells] == ["1.00", "", "", "0.80"]
    assert "2 cores" in table.title


def test_a_process_that_fails_is_told(capfd):
    with pytest.raises(RuntimeError, match=r"expected processes that end with 0, got \[1\]"):
        distributed.measure(distributed.Case(100, 1, "no such type", 2, 8, "float32", 1), ["forward"])
    assert "sparsity_type: expected one of" in capfd.readouterr().err


def test_page_has_what_a_million_tokens_took():
    """The table of the documentation is what `examples/long_document.py` printed: of the processes, the most."""
    root = Path(__file__).parent.parent
    page = (root / "docs/distributed.md").read_text(encoding="utf-8")
    runs = (root / "bench/results/distributed/long_document.txt").read_text(encoding="utf-8").split(" torchrun ")[1:]
    assert len(runs) == 3
    for run in runs:
        tokens, count, seconds, speed = re.search(
            r"([\d,]+) tokens, (\d) proc.*: ([\d.]+) s, ([\d,]+) tok", run
        ).groups()
        peaks, received = zip(
            *re.findall(r"^ +\d+ +[\d,]+ +[\d,]+ +([\d,]+) +([\d,]+)$", run, re.MULTILINE), strict=True
        )
        most = [max(column, key=lambda cell: int(cell.replace(",", ""))) for column in (peaks, received)]
        what = count if tokens == "1,048,576" else f"{count}, of {tokens} tokens"
        assert len(peaks) == int(count)
        assert f"| {what} | {float(seconds):.1f} | {speed} | {most[0]} | {most[1]} |" in page
