"""Every recorded checkpoint of the ten families reproduces the original's outputs."""

import json

import pytest
import torch
import transformers
from family_recordings import CASES, GENERATE, class_of, config_of, load, name_of, recorded

ATOL = 1e-4
each = pytest.mark.parametrize("folder", CASES, ids=name_of)
generating = pytest.mark.parametrize("folder", [x for x in CASES if "seq2seq" in x.name], ids=name_of)
AUTO = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def difference(got, expected, keep):
    """The largest difference in rows that are tokens; of rows 0, 7, 14, ... if only those were recorded."""
    if got.shape != expected.shape:
        got, keep = got[:, ::7], keep[:, ::7]
    assert got.shape == expected.shape
    if keep.shape == got.shape[:2]:
        got, expected = got[keep], expected[keep]
    return (got - expected).abs().max()


def outputs(model, inputs):
    """The model's outputs and, if it is a head on an encoder alone, its base model's."""
    out = dict(model(**inputs))
    if "decoder_input_ids" not in inputs and not model.config.is_encoder_decoder:
        out.update(model.base_model(**inputs))
    return out


@each
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@torch.no_grad()
def test_outputs_equal_the_recording(folder, implementation):
    inputs, results = recorded(folder)
    mask = inputs["attention_mask"].clone()
    model = load(folder, attention_implementation=implementation)
    out = outputs(model, inputs)
    assert torch.equal(mask, inputs["attention_mask"])
    compared = [name for name in results if name in out]
    assert compared
    assert not [name for name in results if name not in out and not name.startswith(("short_", "greedy", "beam"))]
    for name in compared:
        keep = inputs["attention_mask"].bool()
        if name == "encoder_last_hidden_state":
            keep = torch.nn.functional.pad(keep, (out[name].shape[1] - keep.shape[1], 0), value=True)
        assert difference(out[name], results[name], keep) < ATOL, name


@pytest.mark.parametrize("folder", [x for x in CASES if "short_input_ids" in recorded(x)[1]], ids=name_of)
@torch.no_grad()
def test_short_documents_equal_the_recording(folder):
    _, results = recorded(folder)
    short = {name.removeprefix("short_"): x for name, x in results.items() if name.startswith("short_")}
    inputs = {name: short.pop(name) for name in ("input_ids", "attention_mask", "token_type_ids") if name in short}
    model = load(folder)
    if model.config.is_encoder_decoder:
        out = {"encoder_last_hidden_state": model.get_encoder()(**inputs).last_hidden_state}
    else:
        out = outputs(model, inputs)
    assert short
    for name, expected in short.items():
        keep = inputs["attention_mask"].bool()
        if name == "encoder_last_hidden_state":
            keep = torch.nn.functional.pad(keep, (out[name].shape[1] - keep.shape[1], 0), value=True)
        assert difference(out[name], expected, keep) < ATOL, name


@generating
@pytest.mark.parametrize(("name", "num_beams"), [("greedy", 1), ("beam4", 4)])
def test_generated_ids_equal_the_recording(folder, name, num_beams):
    inputs, results = recorded(folder)
    inputs.pop("decoder_input_ids")
    assert torch.equal(load(folder).generate(**inputs, num_beams=num_beams, **GENERATE), results[name])


@each
@torch.no_grad()
def test_auto_classes_and_saved_checkpoints(folder, tmp_path):
    """The Auto classes load the published and the saved checkpoint, as safetensors and .bin, with equal tensors."""
    model, cls = load(folder), class_of(folder)
    suffix = next(suffix for suffix in AUTO if cls.__name__.endswith(suffix))
    auto_class = getattr(transformers, AUTO[suffix])
    if auto_class is transformers.AutoModelForPreTraining and suffix != "ForPreTraining":
        pytest.skip("no Auto class")
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["model_type"] == f"lsg_{config_of(folder)['model_type']}"
    assert not {"auto_map", "base_model_prefix", "attention_implementation"} & set(written)
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "bin/config.json").write_bytes((folder / "config.json").read_bytes())
    for path in (folder, tmp_path / "saved", tmp_path / "bin"):
        again = load(path, auto_class, use_safetensors=path.name != "bin")
        assert type(again) is cls
        assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))
