"""Conversion of a BART: equality with lsg-converter, random numbers, errors, and saving all or nothing."""

import json
import re
import shutil

import pytest
import torch
from checkpoints import BASE, CLASSIFY, CONVERTED, NORM, recorded, seq2seq
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
)

import lsg_attn.bart
from lsg_attn.bart import LSGBartConfig, LSGBartForConditionalGeneration, convert, convert_checkpoint
from lsg_attn.cli.main import main
from lsg_attn.models.conversion import repeat_positions, spread_positions

AS_CONVERTED = {"num_global_tokens": 4, "block_size": 32, "sparse_block_size": 32}
GLOBALS = "model.encoder.global_embeddings.weight"


def states_of(model):
    """Copies of all tensors, by name."""
    return {name: x.clone() for name, x in model.state_dict().items()}


def test_converted_checkpoint_equals_lsg_converters(tmp_path):
    """All tensors, the configuration and the tokenizer's length are equal."""
    convert_checkpoint(BASE, tmp_path / "lsg", 2048, **AS_CONVERTED)
    got, expected = load_file(tmp_path / "lsg/model.safetensors"), load_file(CONVERTED / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    written, published = LSGBartConfig.from_pretrained(tmp_path / "lsg"), LSGBartConfig.from_pretrained(CONVERTED)
    assert written.lsg_pattern() == published.lsg_pattern()
    assert written.max_position_embeddings == 2048
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lsg")
    assert tokenizer.model_max_length == 2048
    text = "many words " * 500
    assert tokenizer(text, truncation=True) == AutoTokenizer.from_pretrained(CONVERTED)(text, truncation=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lsg"]


def test_convert_command(tmp_path, capsys):
    out = tmp_path / "new/lsg"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in AS_CONVERTED.items()]
    arguments = ["convert", str(BASE), str(out), "--max-length", "2048", *flags, "--no-pool-with-global"]
    main(arguments)
    assert "up to 2048 tokens" in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert type(model) is LSGBartForConditionalGeneration
    assert not model.config.pool_with_global
    assert all(torch.equal(x, load_file(CONVERTED / "model.safetensors")[name]) for name, x in _stored(model))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "expected a directory that does not exist yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(BASE), str(tmp_path / "other"), "--block-size", "33"])
    assert "sparsity_factor must divide block_size" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def _stored(model):
    names = load_file(CONVERTED / "model.safetensors").keys()
    return [(name, x) for name, x in model.state_dict().items() if name in names]


@pytest.mark.parametrize(
    ("plain_class", "lsg_name"),
    [
        (BartModel, "LSGBartModel"),
        (BartForConditionalGeneration, "LSGBartForConditionalGeneration"),
        (BartForSequenceClassification, "LSGBartForSequenceClassification"),
    ],
)
def test_converting_a_model_in_memory(plain_class, lsg_name):
    """All weights except positions are copied. The source is unchanged and shares no tensor with the result."""
    torch.manual_seed(0)
    source = plain_class.from_pretrained(BASE).to(torch.bfloat16).train()
    before, tokenizer = states_of(source), AutoTokenizer.from_pretrained(BASE)
    model, new_tokenizer = convert(source, 1500, tokenizer=tokenizer, sparsity_type="stride")
    assert type(model) is getattr(lsg_attn.bart, lsg_name)
    assert (model.dtype, model.training, model.config.sparsity_type) == (torch.bfloat16, True, "stride")
    assert (tokenizer.model_max_length, new_tokenizer.model_max_length) == (1024, 1500)
    for name, x in model.state_dict().items():
        if name in before and "embed_positions" not in name:
            assert torch.equal(x, before[name]), name
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(7)
    assert all(torch.equal(x, before[name]) for name, x in source.state_dict().items())


def test_weights_stay_tied_and_generation_settings_are_copied():
    source = BartForConditionalGeneration.from_pretrained(BASE)
    source.generation_config.length_penalty = 3.5
    model, _ = convert(source, 2048, tokenizer=AutoTokenizer.from_pretrained(BASE))
    shared = model.model.shared.weight
    for module in (model.lm_head, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens):
        assert module.weight is shared
    assert model.generation_config.length_penalty == 3.5
    assert not any(x.is_meta for x in model.state_dict().values())


def test_resize_of_an_lsg_checkpoint(tmp_path):
    """Positions are repeated. Global tokens and settings stay. The recorded logits come out at another length, too."""
    for folder in (NORM, CONVERTED):
        source = seq2seq(folder)
        model, tokenizer = convert(source, 4096)
        assert tokenizer is None
        assert model.config.lsg_pattern() == source.config.lsg_pattern()
        before = states_of(source)
        for name, x in model.state_dict().items():
            if "embed_positions" in name:
                rows = before[name]
                assert torch.equal(x, torch.cat([rows, rows[2:]]))
            else:
                assert torch.equal(x, before[name])
    inputs, results = recorded(NORM)
    with torch.no_grad():
        logits = convert(seq2seq(), 512, block_size=32).model(**inputs).logits
    torch.testing.assert_close(logits, results["logits"], atol=1e-4, rtol=0)
    convert_checkpoint(NORM, tmp_path / "short", 512, tokenizer=AutoTokenizer.from_pretrained(CONVERTED))
    assert LSGBartConfig.from_pretrained(tmp_path / "short").max_position_embeddings == 512


def test_keep_first_global_token():
    source, tokenizer = seq2seq(CONVERTED), AutoTokenizer.from_pretrained(CONVERTED)
    with torch.no_grad():
        source.model.encoder.global_embeddings.weight.add_(1)  # as if trained
    trained = states_of(source)[GLOBALS]
    fresh = load_file(CONVERTED / "model.safetensors")[GLOBALS]
    model, _ = convert(source, 2048, tokenizer=tokenizer, keep_first_global_token=True)
    got = model.state_dict()[GLOBALS]
    assert torch.equal(got[0], trained[0])
    # There are now 2,048 positions, so every fourth is used instead of every second.
    positions = seq2seq(CONVERTED).model.encoder.embed_positions.weight.detach()[2:]
    expected = spread_positions(positions, 64, torch.Generator()) + source.model.shared.weight[tokenizer.mask_token_id]
    assert torch.equal(got[1:], expected.detach()[1:])
    assert not torch.equal(got[1:], fresh[1:])


def test_random_global_init():
    """The same seed gives the same tensors. Without positions, the rows are distributed like the embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(1)
    rows = [convert(BASE, 2048, random_global_init=True, seed=seed).model.state_dict()[GLOBALS] for seed in (5, 5, 6)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    source = BartModel.from_pretrained(BASE)
    table = source.shared.weight.detach()
    positions = spread_positions(source.encoder.embed_positions.weight.detach()[2:], 64, torch.Generator())
    assert torch.equal(rows[0][0], table[tokenizer.bos_token_id] + positions[0])
    drawn = (rows[0] - positions)[1:].double()
    expected = torch.distributions.MultivariateNormal(table.double().mean(0), torch.cov(table.double().T))
    # Mahalanobis distances of 511 samples in d dimensions: mean d, standard error sqrt(2 d / 511)
    distances = (drawn - expected.mean) @ expected.precision_matrix * (drawn - expected.mean)
    width = table.shape[1]
    assert abs(distances.sum(1).mean().item() - width) < 5 * (2 * width / 511) ** 0.5


def test_positions_are_repeated():
    weight = torch.arange(12.0).reshape(6, 2)
    assert repeat_positions(weight, 3).tolist() == weight[:5].tolist()
    assert torch.equal(repeat_positions(weight, 9), torch.cat([weight, weight[2:], weight[2:3]]))


@pytest.mark.parametrize(("count", "stride"), [(512, 64), (1024, 64), (1024, 2), (1300, 128), (4096, 8), (4096, 4096)])
def test_global_positions_are_strides_apart(count, stride):
    """Each is ``stride`` after the previous one, or starts a new pass. No position is used twice."""
    order = spread_positions(torch.arange(float(count)).unsqueeze(1), stride, torch.Generator()).flatten()
    factor = count // 512
    assert sorted(order.tolist()) == [factor * i for i in range(512)]
    steps = order.diff()
    passes = stride // factor
    assert (steps == stride).sum() == 512 - passes if passes < 512 else torch.all(steps == factor)
    assert order[:: 512 // passes].tolist() == [factor * i for i in range(passes)]


def test_missing_positions_are_drawn_from_the_seed():
    positions = torch.randn(100, 8) * 3 + 5
    one, two = (spread_positions(positions, 1, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one[:100], positions)
    assert ((one[100:].mean(0) - positions.mean(0)).abs() < 5 * positions.std(0) / 412**0.5).all()


def plain(**keys):
    """A small random BART."""
    return BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=20, **keys))


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        (BASE, {"max_length": 0}, ValueError, "max_length: expected an int >= 1, got 0"),
        (BASE, {"num_globals": 3}, TypeError, "expected keys out of .* got num_globals"),
        (BASE, {"sparsity_factor": 3}, ValueError, "sparsity_factor must divide block_size"),
        (BASE, {"keep_first_global_token": True}, ValueError, "keep_first_global_token: expected False for a BART"),
        (NORM, {"random_global_init": True}, ValueError, "random_global_init: expected False for an LSG-BART"),
        (BASE, {"global_positional_stride": 3}, ValueError, "global_positional_stride: expected 2 times a power of 2"),
        (BASE, {"global_positional_stride": 1}, ValueError, "global_positional_stride: expected 2 times a power of 2"),
        (BASE, {"tokenizer": object()}, ValueError, "tokenizer: expected one with bos_token and mask_token"),
        (CLASSIFY, {}, ValueError, "which has none of tokenizer.json, vocab.json"),
        (BASE, {"seed": "one"}, TypeError, "seed: expected an int"),
        (plain, {}, ValueError, "tokenizer: expected one with bos_token and mask_token, .* got NoneType"),
        (lambda: BartForCausalLM(plain().config), {}, ValueError, "expected one of BartModel, .* got BartForCausalLM"),
        (
            lambda: torch.nn.Linear(2, 2),
            {},
            TypeError,
            "expected a model of transformers, a name or a directory, got Linear",
        ),
    ],
)
def test_bad_arguments_are_refused(source, arguments, error, message):
    if source == NORM:
        arguments = {**arguments, "tokenizer": AutoTokenizer.from_pretrained(CONVERTED)}
    with pytest.raises(error, match=message):
        convert(source() if callable(source) else source, **arguments)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "t5"}, "expected one of BART, mBART, .*, or its LSG model, got model_type 't5' at "),
        ({"model_type": None}, "expected one of BART, mBART, .*, or its LSG model, got model_type None at "),
        ({"architectures": ["BartForCausalLM"]}, "expected one of BartModel, .* got BartForCausalLM"),
    ],
)
def test_other_architectures_are_refused(keys, message, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "lsg")
    assert not (tmp_path / "lsg").exists()


@pytest.mark.filterwarnings("ignore:Moving the following attributes in the config")
def test_bart_model_directories_are_converted_with_a_head(tmp_path):
    """facebook/bart-base names BartModel and keeps generation settings in its configuration."""
    base = BartModel.from_pretrained(BASE)
    base.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "source")
    path = tmp_path / "source/config.json"
    settings = {"num_beams": 4, "no_repeat_ngram_size": 3, "auto_map": {"AutoModel": "theirs.Model"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    convert_checkpoint(tmp_path / "source", tmp_path / "lsg", 2048, **AS_CONVERTED)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "lsg")
    assert type(model) is LSGBartForConditionalGeneration
    expected = load_file(CONVERTED / "model.safetensors")
    assert all(torch.equal(x, expected[name]) for name, x in _stored(model))
    assert "auto_map" not in json.loads((tmp_path / "lsg/config.json").read_text())
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "source")
    for name in ("num_beams", "no_repeat_ngram_size"):
        expected = settings[name]
        assert getattr(plain.generation_config, name) == expected
        assert getattr(model.generation_config, name) == expected


@pytest.mark.parametrize("lacking", ["model.encoder.layers.0.fc1.weight", "model.shared.weight"])
def test_missing_weights_are_refused(lacking, tmp_path):
    shutil.copytree(BASE, tmp_path / "source")
    states = load_file(BASE / "model.safetensors")
    del states[lacking]
    save_file(states, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"expected all weights of a BartForConditionalGeneration .*{lacking}"):
        convert_checkpoint(tmp_path / "source", tmp_path / "lsg")
    assert not (tmp_path / "lsg").exists()


def test_attention_implementations_are_kept():
    source = seq2seq(attn_implementation="eager", attention_implementation="reference")
    model, _ = convert(source, 512)
    assert model.config._attn_implementation == "eager"
    assert model.model.encoder.layers[0].self_attn.implementation == "reference"


def test_interrupting_save_pretrained_leaves_nothing(tmp_path, monkeypatch):
    save = LSGBartForConditionalGeneration.save_pretrained

    def stop(model, folder):
        save(model, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(LSGBartForConditionalGeneration, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(BASE, tmp_path / "lsg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["convert", "write", "check"])
def test_interrupting_a_step_leaves_nothing(step, tmp_path):
    """Ctrl-C at the start of any step leaves no file behind."""

    def interrupt(name):
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(BASE, tmp_path / "lsg", on_step=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_saved_checkpoint_is_checked(tmp_path, monkeypatch):
    """If the saved weights differ from the model, the check finds it and no checkpoint is created."""
    save = LSGBartForConditionalGeneration.save_pretrained

    def save_badly(model, folder):
        good = model.final_logits_bias
        model.final_logits_bias = good + 1
        save(model, folder)
        model.final_logits_bias = good

    monkeypatch.setattr(LSGBartForConditionalGeneration, "save_pretrained", save_badly)
    with pytest.raises(
        RuntimeError, match=re.escape("the saved checkpoint differs from the converted model: final_logits_bias")
    ):
        convert_checkpoint(BASE, tmp_path / "lsg")
    assert list(tmp_path.iterdir()) == []
