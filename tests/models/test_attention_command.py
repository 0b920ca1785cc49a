"""`lsg-attn attention`: the maps of every family against what its layers compute, the page's data, bad input."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoints import BASE, CONVERTED
from family_recordings import FOLDER, tiny
from pages import data_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lsg_attn import LSGAttention, attention_weights
from lsg_attn.cli.attention_maps import read_maps, tokens_of
from lsg_attn.cli.attention_picture import KEYS, UNITS, save_maps_page
from lsg_attn.cli.main import main
from lsg_attn.models import convert
from lsg_attn.models.families import FAMILIES

TEXT = "Tom & Jerry's </script><b>café</b> 🙂🙂\n\n  said:\tthe <!-- quick --> brown fox jumps. " * 4
SIZES = {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 4}
OPTIONS = [word for key, value in SIZES.items() for word in ("--" + key.replace("_", "-"), str(value))]


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words():
    """A fast tokenizer of whole words and marks, with ids below 99."""
    pieces = sorted(set(re.findall(r"\w+|[^\w\s]+", TEXT)))
    special = {"<unk>": 0, "<pad>": 1, "</s>": 2, "<s>": 3, "<mask>": 4}
    vocabulary = special | {piece: 5 + n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def weights_of_layer(folder, ids, layer, **keys):
    """The weights of a layer, the mean over heads, as a hook on the layers' attention finds them."""
    model, _ = convert(folder, ids.shape[1], **keys)
    base, seen = model.float().base_model, []
    encoder = base.get_encoder() if base.config.is_encoder_decoder else base

    def hook(module, args, kwargs):
        seen.append((module, [*args, *kwargs.values()][0]))  # its name differs

    for module in encoder.modules():
        if isinstance(module, LSGAttention):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        encoder(ids)
        module, hidden = seen[layer]
        query, key, _ = module.project(hidden)
        mask = torch.ones_like(ids)
        mask[:, 0] = not keys.get("mask_first_token", False)
        rows = range(query.shape[2])
        return attention_weights(query, key, module.pattern, mask, rows=rows)[0].mean(0), len(seen)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_maps_of_every_family_are_those_of_the_layer(family, document, tmp_path, words):
    tiny(family).save_pretrained(tmp_path / "lsg")
    words.save_pretrained(tmp_path / "lsg")
    reading = read_maps(document, str(tmp_path / "lsg"), ["norm", "stride"], num_tokens=50)
    ids = torch.tensor([words(TEXT, truncation=True, max_length=50).input_ids])
    assert [each.pattern.sparsity_type for each in reading.maps] == ["norm", "stride"]
    for pattern, weights in reading.maps:
        expected, num_layers = weights_of_layer(tmp_path / "lsg", ids, 1, sparsity_type=pattern.sparsity_type)
        assert (reading.layer, reading.num_layers, reading.num_heads) == (1, num_layers, 4) == (1, 2, 4)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert (reading.source, reading.model) == ("document.txt", "lsg")
    assert (reading.pieces[:4], reading.pieces[-1]) == (["global 0", "global 1", "global 2", "<s>"], "</s>")
    assert reading.special == [0, 1, 2, 3, 52]
    text = "".join(reading.pieces[4:-1])
    assert TEXT.startswith(text)
    assert len(re.findall(r"\w+|[^\w\s]+", text)) == 48


@pytest.mark.parametrize("folder", [BASE, FOLDER / "bert/base_512"], ids=["BART", "BERT"])
def test_a_plain_model_is_converted(folder, document):
    reading = read_maps(document, str(folder), ["pooling"], num_tokens=50, **SIZES)
    ids = torch.tensor([convert(folder, 50)[1](TEXT, truncation=True, max_length=50).input_ids])
    expected, num_layers = weights_of_layer(folder, ids, reading.layer, sparsity_type="pooling", **SIZES)
    assert reading.layer == num_layers // 2
    torch.testing.assert_close(reading.maps[0].weights, expected, rtol=1e-4, atol=1e-6)


def test_an_lsg_model_keeps_its_configuration(document, tmp_path):
    """A first token that is hidden, more globals, 16 bits, sizes of its own; a short document is read as a whole."""
    model, tokenizer = convert(CONVERTED, 600, num_global_tokens=3, mask_first_token=True, resize_lsg=False, **SIZES)
    for each in (model.bfloat16(), tokenizer):
        each.save_pretrained(tmp_path / "lsg")
    reading = read_maps(document, str(tmp_path / "lsg"), ["lsh"], num_tokens=400, layer=0)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert reading.total == ids.shape[1] == len(reading.pieces) - 3
    assert reading.pieces[:3] == ["global 0", "global 1", "global 2"]
    expected, _ = weights_of_layer(tmp_path / "lsg", ids, 0, sparsity_type="lsh", mask_first_token=True)
    torch.testing.assert_close(reading.maps[0].weights, expected, rtol=1e-4, atol=1e-6)
    assert torch.all(reading.maps[0].weights[:, 3] == 0)


def test_page_has_the_strongest_keys_of_each_token(document, tmp_path, capsys):
    out = tmp_path / "attention.html"
    main(["attention", str(document), "--model", str(BASE), "--out", str(out), "--tokens", "60", *OPTIONS])
    total = read_maps(document, str(BASE), ["none"], num_tokens=3).total
    sizes = "B=8, s=8, f=4, G=1"
    caption = f"document.txt, the first 60 of {total} tokens; base, layer 1 of 0 to 1, mean of 4 heads; {sizes}"
    assert capsys.readouterr().out == f"{out}: {caption}\n"
    data = data_of(out)
    types = [each["name"] for each in data["types"]]
    assert types == ["norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh", "none"]
    assert (data["caption"], data["keys"]) == (caption, KEYS)
    reading = read_maps(document, str(BASE), types, num_tokens=60, **SIZES)
    assert (data["pieces"], data["special"]) == (reading.pieces, [0, 1, 60])
    for each, (_, weights) in zip(data["types"], reading.maps, strict=True):
        for row, right in zip(each["rows"], weights, strict=True):
            keys, drawn = torch.tensor(row[::2]), torch.tensor(row[1::2]) / UNITS
            assert 0 < len(keys.unique()) == len(keys) <= KEYS
            assert (drawn - right[keys]).abs().max() <= 0.5 / UNITS + 1e-6
            others = right.index_fill(0, keys, 0.0).max()
            assert others <= (drawn.min() if len(keys) == KEYS else 0) + 0.5 / UNITS + 1e-6
    source = out.read_text(encoding="utf-8")
    assert source.count("</script>") == 2
    assert "<b>caf" not in source


def test_png_is_drawn_and_dense_attention_noted(document, tmp_path, capsys):
    out = tmp_path / "attention.png"
    arguments = ["attention", str(document), "--model", str(BASE), "--out", str(out), "--layer", "0"]
    main([*arguments, "--tokens", "40", "--sparsity-type", "norm", "none"])
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    lines = capsys.readouterr().out
    assert "layer 0 of 0 to 1" in lines
    assert "40 tokens are no more than two blocks of 128, so all see each other" in lines


def test_later_tokens_of_a_character_are_empty(document, tmp_path):
    """BART's tokenizer has four tokens for a face."""
    reading = read_maps(document, str(BASE), ["none"], num_tokens=100)
    save_maps_page(tmp_path / "page.html", reading)
    assert "" in reading.pieces
    assert any("🙂" in piece for piece in data_of(tmp_path / "page.html")["pieces"])


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match=r"expected a fast one, .* got SimpleNamespace"):
        tokens_of(SimpleNamespace(is_fast=False), TEXT, 50)


def test_bad_input_ends_in_one_line(document, tmp_path, monkeypatch, capsys):
    def message(*arguments, model=BASE, out="page.html"):
        with pytest.raises(SystemExit) as stop:
            main(["attention", "--model", str(model), "--out", str(tmp_path / out), *map(str, arguments)])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("lsg-attn: ")
        assert error.count("\n") == 1
        assert not (tmp_path / out).exists()
        return error

    assert "No such file" in message(tmp_path / "none.txt")
    assert "ends in .png or .html" in message(document, out="page.pdf")
    assert "--tokens: expected at least 3, got 2" in message(document, "--tokens", 2)
    assert "--layer: expected 0 to 1, got 2" in message(document, "--layer", 2)
    assert "--layer: expected 0 to 1, got -1" in message(document, "--layer", -1)
    assert "must divide block_size" in message(document, "--block-size", 6, "--sparsity-factor", 4)
    for folder in (tmp_path / "none", "./none"):
        assert f"or its directory, got {folder}, which does not exist" in message(document, model=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2"}')
    assert "expected one of BART" in message(document, model=tmp_path / "other")
    shutil.copytree(BASE, tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    assert "tokenizer: expected one at" in message(document, model=tmp_path / "no_tokenizer")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "bytes.txt: expected a text in UTF-8" in message(tmp_path / "bytes.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "has no tokens" in message(tmp_path / "empty.txt")
    monkeypatch.setattr("lsg_attn.cli.needs.find_spec", lambda name: None if name == "matplotlib" else name)
    assert "pip install 'lsg-attn[plot]'" in message(document, out="picture.png")
    monkeypatch.setattr("lsg_attn.cli.needs.find_spec", lambda name: None)
    assert "pip install 'lsg-attn[models]'" in message(document)
