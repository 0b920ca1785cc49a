"""bench.static.ranks: what the model says that ranks receive is what they do receive."""

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from rich.console import Console

from bench.static import model
from bench.static.ranks import Attention, all_gather, context_parallel, hidden_from, ring, table_of_others, ulysses
from lsg_attn import LSGPattern, distributed, lsg_attention
from lsg_attn.sections import shares

BFLOAT16 = Attention(LSGPattern(), 1, 16, 16, 64, torch.bfloat16)


def cases():
    """Attentions and tokens: dense ones, empty spans, and spans shorter than the halo, which several ranks have."""
    rng = random.Random(0)
    kinds = itertools.product(("norm", "bos_pooling", "none"), (False, True), (0, 17))
    for i, (name, causal, count) in enumerate(kinds):
        pattern = LSGPattern(8, 8, 2, name, count, causal=causal)
        dtype = (torch.float32, torch.float64, torch.bfloat16)[i % 3]
        for tokens in rng.sample((16, 24, 40, 200), 2):
            yield Attention(pattern, 2, 4, rng.choice((2, 4)), 6, dtype, has_mask=rng.random() < 0.5), tokens


def check_traffic(mesh):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for attention, tokens in cases():
        sizes = [span.size for span in shares(tokens, ranks, attention.pattern.block_size)]
        expected = context_parallel(attention, sizes, rank)
        length = attention.pattern.num_global_tokens + sizes[rank]
        heads = (attention.heads, attention.key_heads, attention.key_heads)
        qkv = [torch.randn(2, n, length, 6, dtype=attention.dtype, requires_grad=True) for n in heads]
        mask = torch.ones(2, sizes[rank], dtype=torch.bool) if attention.has_mask else None
        with distributed.context_parallel(mesh) as group:
            out = lsg_attention(*qkv, attention.pattern, mask)
            forward = group.received_bytes, group.messages
            out.sum().backward()
        assert forward == (expected.forward.received_bytes, expected.forward.messages), (attention, sizes)
        both = expected.forward + expected.backward
        assert (group.received_bytes, group.messages) == (both.received_bytes, both.messages), (attention, sizes)


def test_ranks_receive_what_the_model_says(tmp_path):
    run_processes(4, [check_traffic], tmp_path)


def test_traffic_does_not_grow_with_spans_longer_than_the_halo():
    for attention, _ in cases():
        halo = attention.pattern.halo
        found = [[context_parallel(attention, [n] * 5, rank) for rank in range(5)] for n in (halo, 10 * halo)]
        assert found[0] == found[1]
        assert context_parallel(attention, [halo], 0).forward.messages == 0


def test_other_ways_by_hand():
    """Eight ranks of 100 rows; a row of 16 heads of 64 in 16 bits has 2,048 bytes, one of 4 heads 512."""
    attention = Attention(LSGPattern(), 1, 16, 4, 64, torch.bfloat16)
    assert [x.received_bytes for x in ring(attention, 100, 8)] == [7 * 100 * 1024, (7 + 8) * 100 * 1024]
    assert [x.received_bytes for x in all_gather(attention, 100, 8)] == [7 * 100 * 1024] * 2
    assert ulysses(attention, 100, 8) is None
    assert [x.received_bytes for x in ulysses(attention, 100, 4)] == [75 * (2 * 2048 + 2 * 512)] * 2


@pytest.mark.parametrize("is_backward", [False, True])
def test_exchange_is_hidden_from_some_span_on(is_backward):
    bound, rate = model.bound_of(BFLOAT16), 50e9
    tokens = hidden_from(BFLOAT16, 8, bound, rate, is_backward)
    for n, is_hidden in ((tokens, True), (tokens - 128, False)):
        traffic = context_parallel(BFLOAT16, [n] * 8, 4)[is_backward]
        assert (traffic.received_bytes / rate <= 1e-6 * bound(n, is_backward)) == is_hidden


def test_performance_page_has_these_figures(monkeypatch):
    """Those of the command that it names, of the types whose figures differ."""
    console = Console(record=True, width=400)
    monkeypatch.setattr(model.ranks, "Console", lambda **_: console)
    model.main(["--ranks", "8", "64", "1024", "--types", "norm", "bos_pooling", "none"])
    lines = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines() if "│" in line]
    assert len(lines) == 3 * 3 + 3 * 3
    page = (Path(__file__).parents[1] / "docs/performance.md").read_text(encoding="utf-8").splitlines()
    for _, *cells, _ in lines:
        assert f"| {' | '.join(cells)} |" in page


def test_more_ranks_than_heads_have_no_ulysses():
    assert "more ranks than heads" in [*table_of_others(BFLOAT16, 4096, [17]).columns[2].cells]


def test_packed_sequences_are_not_shared_out(capsys):
    with pytest.raises(SystemExit):
        model.main(["--ranks", "8", "--lengths", "100"])
    assert "expected one sequence" in capsys.readouterr().err
