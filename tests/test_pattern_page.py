"""The page of `lsg-attn pattern --out PAGE.html`: its data against the pattern, and that it needs nothing else."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import data_of
from strategies import cases

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.cli.draw import KINDS, SPARSE, compressed_keys, kinds_of_keys
from lsg_attn.cli.main import main
from lsg_attn.cli.page import write_page
from lsg_attn.cli.pattern_page import save_pattern_page

DOCS = Path(__file__).parent.parent / "docs"
PAGES = Path(__file__).parent.parent / "lsg_attn/cli/pages"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "pattern.html"


@given(case=cases(), data=st.data())
def test_page_shows_the_keys_of_each_block(case, data, page):
    pattern, length, _ = case
    first, num_tokens = pattern.num_global_tokens, length - pattern.num_global_tokens
    padding = data.draw(st.integers(0, num_tokens))
    head = data.draw(st.integers(0, max(pattern.sparsity_factor - 1, 0))) if pattern.rule.varies_by_head else 1
    save_pattern_page(page, [pattern], num_tokens, padding, head)
    found = data_of(page)
    (panel,) = found["panels"]
    kinds = kinds_of_keys(pattern, num_tokens, padding, head)
    assert (found["head"], panel["globals"], panel["length"]) == (head, first, length)
    assert [kind["color"] for kind in found["kinds"]] == [kind[3] for kind in KINDS]
    rows, sizes = [], []
    for block in panel["blocks"]:
        row = [kind for kind, count in block["runs"] for _ in range(count)]
        rows += [row] * (block["stop"] - block["start"])
        sizes.append(block["stop"] - block["start"])
        made_of = [panel["members"][slot] for slot in block["compressed"]]
        assert all(made_of)  # a key that a query sees is made of something
        assert sorted(key for keys in made_of for key in keys) == [
            key for key, kind in enumerate(row) if kind == SPARSE
        ]
    assert rows == kinds.tolist()
    last = (num_tokens - 1) % pattern.block_size + 1
    assert sizes == [first][: first > 0] + [pattern.block_size] * (pattern.num_blocks(num_tokens) - 1) + [last]


def test_compressed_keys_say_what_they_are_made_of(page):
    """The windows and what is in them by other arithmetic: two globals, 5 blocks of 4, of which the last has one."""
    patterns = [LSGPattern(4, 2, 2, name, 2) for name in ("pooling", "stride", "block_stride")]
    save_pattern_page(page, patterns, 17, 1, head=1)
    pooling, stride, block_stride = (panel["members"] for panel in data_of(page)["panels"])
    assert pooling == [[2 + 2 * n, 3 + 2 * n] for n in range(8)] + [[], []]  # token 16 is padding
    assert stride == [[3 + 2 * n] for n in range(8)] + [[], []]
    assert block_stride == [[4 + n + n // 2 * 2] for n in range(8)] + [[], []]
    for panel in data_of(page)["panels"]:
        assert [block["start"] for block in panel["blocks"]] == [0, 2, 6, 10, 14, 18]
        assert [block["compressed"] for block in panel["blocks"]] == [[], [4, 5], [6, 7], [0, 1], [2, 3], [4, 5]]


def test_members_are_those_of_the_head(page):
    pattern = LSGPattern(8, 8, 4, "norm", 0)
    save_pattern_page(page, [pattern], 40, head=3)
    token = compressed_keys(pattern, 40, head=3).token[0, 3]
    assert data_of(page)["panels"][0]["members"] == [[x] for x in token.tolist()]
    assert not torch.equal(token, compressed_keys(pattern, 40, head=3).token[0, 0])


def test_page_in_the_docs_is_what_the_command_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^lsg-attn (pattern .*pattern\.html)$", (DOCS / "pattern.md").read_text(), re.MULTILINE)
    main(shlex.split(command))
    assert (tmp_path / "pattern.html").read_bytes() == (DOCS / "pattern.html").read_bytes()
    names = [panel["title"].split(":")[0] for panel in data_of(DOCS / "pattern.html")["panels"]]
    assert names == [name for name in SPARSITY_TYPES if name != "none"]


@pytest.mark.parametrize("template", sorted(PAGES.iterdir()), ids=lambda path: path.name)
def test_pages_need_nothing_from_elsewhere(template, tmp_path):
    source = template.read_text(encoding="utf-8")
    assert not re.search(r"\ssrc\s*=|<link|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b|WebSocket", source)
    assert set(re.findall(r"https?://[^\"'\s]+", source)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in source  # texts stay texts
    hostile = "</script><script>alert(1)</script><!-- \u2028 {{ data }} \\u003c & é"
    write_page(tmp_path / "page.html", template.name, {"text": hostile})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "alert" in page
    assert page.count("<script") == source.count("<script")
    assert page.count("<!--") == source.count("<!--")
    assert data_of(tmp_path / "page.html") == {"text": hostile}
