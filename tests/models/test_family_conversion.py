"""Conversion of every family: equality with lsg-converter, and what it gets wrong."""

import json
import shutil

import pytest
import torch
from family_recordings import CONVERSIONS, FOLDER, config_of, document, load, name_of, tiny, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, PegasusForConditionalGeneration, RobertaForMaskedLM

import lsg_attn.models
from lsg_attn.models import convert, convert_checkpoint
from lsg_attn.models.conversion import sines
from lsg_attn.models.families import FAMILIES

KEYS = {"block_size": 16, "sparse_block_size": 16, "num_global_tokens": 3}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


class Tokenizer:
    """As much of a tokenizer as a conversion of a model in memory needs."""

    bos_token_id, mask_token_id, model_max_length = 3, 4, 100


@pytest.mark.parametrize("folder", CONVERSIONS, ids=name_of)
def test_equals_lsg_converter(folder, tmp_path):
    """All tensors of the saved checkpoint are equal to those of the original's."""
    asked = json.loads((folder / "conversion.json").read_text())
    options = asked["converter"]
    source = folder.parent / asked["source"]
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base_512")
    max_length = options.pop("max_sequence_length")
    convert_checkpoint(source, tmp_path / "lsg", max_length, tokenizer=tokenizer, **options, **asked["model"])
    got, expected = load_file(tmp_path / "lsg/model.safetensors"), load_file(folder / "model.safetensors")
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    written, published = config_of(tmp_path / "lsg"), config_of(folder)
    for key in ("max_position_embeddings", "architectures", *asked["model"]):
        assert written[key] == published[key]
    card = (tmp_path / "lsg/README.md").read_text()
    for fact in (written["architectures"][0], str(max_length), "untrained", "import lsg_attn.models", source.name):
        assert fact in card


@each_family
def test_a_converted_model_runs_at_its_length_and_no_longer(family):
    """Longer than the source's 256 positions, and no multiple of the block size. Every buffer has memory."""
    for cls in family.convertible:
        source = plain(family, cls)
        model, _ = convert(source, 301, tokenizer=Tokenizer(), **KEYS)
        assert type(model) is cls
        assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
    model, _ = convert(plain(family, family.models[0]), 301, tokenizer=Tokenizer(), **KEYS)
    ids, mask = document(length=301)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    assert encoder(ids, mask).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"expected at most max_position_embeddings.*=301 tokens, got 302"):
        encoder(*document(length=302))


def plain(family, cls, **keys):
    """A small random plain model."""
    torch.manual_seed(0)
    config = {key: x for key, x in tiny_config(family, **keys).to_dict().items() if key != "model_type"}
    return cls.plain_class(family.config_class.plain_class(**config)).eval()


def test_segments_are_added_as_asked():
    """lsg-converter adds segment 0 twice to random globals, and never to RoBERTa's, whatever it is told."""
    for name, by_default in (("BERT", True), ("RoBERTa", False)):
        family = next(family for family in FAMILIES if family.title == name)
        source = plain(family, family.models[0])
        table = source.embeddings.token_type_embeddings.weight[0].detach()
        for random in (False, True):
            rows = {
                asked: convert(
                    source, 256, tokenizer=Tokenizer(), use_token_ids=asked, random_global_init=random
                ).model.embeddings.global_embeddings.weight.detach()
                for asked in (None, True, False)
            }
            torch.testing.assert_close(rows[True] - rows[False], table.expand(512, -1), atol=1e-5, rtol=0)
            assert torch.equal(rows[None], rows[by_default])


def test_global_tokens_of_an_lsg_model():
    """They are kept; or all but the first are made anew, or all."""
    family = next(family for family in FAMILIES if family.title == "BERT")
    source = tiny(family)
    table = source.embeddings.global_embeddings.weight.detach()
    kept, first, none = (
        convert(source, 300, tokenizer=Tokenizer(), **options).model.embeddings.global_embeddings.weight.detach()
        for options in ({}, {"keep_first_global_token": True}, {"resize_lsg": False})
    )
    assert torch.equal(kept, table)
    assert torch.equal(first[0], table[0])
    assert torch.equal(first[1:], none[1:])
    assert not torch.isclose(none, table).all(dim=1).any()


def test_architecture(tmp_path):
    """Another head than the directory names; its weights are new, and a warning names them."""
    folder = FOLDER / "bert/base_512"
    for name in ("BertForTokenClassification", "LSGBertForTokenClassification"):
        with pytest.warns(UserWarning, match=r"has no weights for \['classifier.bias', 'classifier.weight'\]"):
            model, _ = convert(folder, 600, architecture=name)
        assert type(model) is lsg_attn.models.LSGBertForTokenClassification
    assert type(convert(folder, 600, architecture="BertForMaskedLM").model) is lsg_attn.models.LSGBertForMaskedLM
    with pytest.raises(ValueError, match=r"expected one of BertModel, .* got BertForEverything"):
        convert(folder, 600, architecture="BertForEverything")
    with pytest.raises(ValueError, match="architecture: expected None for a model in memory"):
        convert(BertModel.from_pretrained(folder), 600, architecture="BertModel", tokenizer=Tokenizer())


def test_pegasus_without_position_tables(tmp_path):
    """Older files lack them: they are sines. Without BOS, the decoder's first token stands in."""
    folder = FOLDER / "pegasus/base_512"
    shutil.copytree(folder, tmp_path / "old")
    states = {name: x for name, x in load_file(folder / "model.safetensors").items() if "embed_positions" not in name}
    save_file(states, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    model, _ = convert(tmp_path / "old", 600, **KEYS)
    expected, _ = convert(folder, 600, **KEYS)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), expected.parameters(), strict=True))
    table = PegasusForConditionalGeneration.from_pretrained(folder).model.encoder.embed_positions.weight
    torch.testing.assert_close(sines(512, table), table, atol=1e-6, rtol=0)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "old/config.json").write_text(json.dumps({**config, "bos_token_id": None, "decoder_start_token_id": 7}))
    model, _ = convert(tmp_path / "old", 600, **KEYS)
    rows = model.model.encoder.global_embeddings.weight
    torch.testing.assert_close(rows[0], model.model.shared.weight[7] + sines(1, rows)[0])


def test_position_tables_that_are_too_short_for_the_original():
    """64 rows and 2 of offset: lsg-converter makes 4,032 rows where 4,096 are asked for."""
    family = next(family for family in FAMILIES if family.title == "RoBERTa")
    source = plain(family, family.models[0])
    source.embeddings.position_embeddings = torch.nn.Embedding(66, 32)
    source.config.max_position_embeddings = 66
    model, _ = convert(source, 4096, tokenizer=Tokenizer(), **KEYS)
    assert model.embeddings.position_embeddings.weight.shape[0] == model.config.max_position_embeddings == 4098


def test_keys_are_checked_before_the_work():
    """lsg-converter converts with these and fails, or changes the model, once it is saved and loaded."""
    folder = FOLDER / "roberta/base_512"
    for keys, message in (
        ({"num_global_tokens": 600}, "num_global_tokens: expected at most 512, got 600"),
        ({"num_global_tokens": 0}, "num_global_tokens: expected at least 1 for pool_with_global=True, got 0"),
        ({"block_size": 30, "sparsity_factor": 4}, "sparsity_factor must divide block_size"),
        ({"mask_first_token": True, "pool_with_global": False}, "pool_with_global: expected True with mask_first"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, 600, **keys)
    with pytest.raises(TypeError, match=r"expected keys out of .* got pass_global_tokens_to_decoder"):
        convert(folder, 600, pass_global_tokens_to_decoder=True)
    with pytest.raises(ValueError, match=r"RobertaForMaskedLM, .*got MBartForCausalLM"):
        convert(folder, 600, architecture="MBartForCausalLM")


def test_mask_first_token_makes_short_documents_exact():
    """Global 0 is then the first token, at position 0, with the same weights: attention is full up to 2B tokens."""
    source = RobertaForMaskedLM.from_pretrained(FOLDER / "roberta/base_512").eval()
    keys = {"block_size": 32, "sparse_block_size": 32, "mask_first_token": True, "use_token_ids": True}
    model, _ = convert(FOLDER / "roberta/base_512", 600, **keys)
    ids, mask = document(length=60)
    ids[:, 0] = source.config.bos_token_id
    with torch.no_grad():
        got, expected = (x.roberta(ids, mask).last_hidden_state for x in (model.eval(), source))
    assert (got - expected)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("broken", ["truncated", "sizes", "text"])
def test_files_that_cannot_be_loaded(broken, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(FOLDER / "bert/base_512", folder)
    weights = folder / "model.safetensors"
    if broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif broken == "sizes":
        states = load_file(weights)
        states["bert.pooler.dense.weight"] = torch.zeros(3, 3)
        save_file(states, weights, metadata={"format": "pt"})
    else:
        weights.write_text("not weights")
    with pytest.raises(ValueError, match=f"cannot load {folder} as a BertForPreTraining: "):
        convert_checkpoint(folder, tmp_path / "lsg", 600)
    assert not (tmp_path / "lsg").exists()


def test_an_unusable_destination_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("lsg_attn.models.checkpoint.convert", lambda *_, **__: pytest.fail("converted"))
    (tmp_path / "file").write_text("")
    for destination, error in (("file", FileExistsError), ("file/lsg", NotADirectoryError)):
        with pytest.raises(error, match="destination: expected a directory"):
            convert_checkpoint(FOLDER / "bert/base_512", tmp_path / destination)


def test_a_loaded_conversion_is_the_model():
    """The README's way: the folder's class by name."""
    model = load(FOLDER / "electra/converted")
    ids, mask = document(length=501)
    assert model(ids, mask).logits.shape == (2, 501)
