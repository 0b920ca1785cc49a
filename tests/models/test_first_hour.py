"""What a newcomer does wrong in the first hour: each error says what to do next."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import BASE, CONVERTED, NORM, seq2seq
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    pipeline,
)

from lsg_attn import LSGPattern
from lsg_attn.models import (
    LSGBartConfig,
    LSGBartModel,
    LSGBertConfig,
    LSGBertModel,
    LSGPegasusModel,
    convert,
    convert_checkpoint,
    use_lsg,
)

IDS = torch.full((2, 30), 5)
SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
IMPORT = """
import sys, types
for name, module in {
    "no transformers": None,
    "4.40.0": types.SimpleNamespace(__version__="4.40.0"),
    "5.0.0": types.SimpleNamespace(__version__="5.0.0"),
}.items():
    sys.modules["transformers"] = module
    try:
        import lsg_attn.models
    except ImportError as error:
        print(type(error).__name__, error)
"""


def test_import_without_transformers_or_with_one_that_does_not_work():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    expected = "ImportError lsg_attn.models: expected transformers >= 4.44.2 other than 5.0.0, got {}; pip install"
    lines = done.stdout.splitlines()
    assert lines[0] == "ModuleNotFoundError lsg_attn.models needs transformers: pip install 'lsg-attn[models]'"
    assert len(lines) == 3
    assert all(line.startswith(expected.format(x)) for line, x in zip(lines[1:], ("4.40.0", "5.0.0"), strict=True))


@pytest.mark.parametrize("published", [True, False])
def test_a_class_of_another_family_names_the_right_one(published, tmp_path):
    """Of what lsg-converter wrote, and of what this library writes."""
    folder = NORM
    if not published:
        seq2seq().save_pretrained(folder := tmp_path)
    for cls in (LSGBertModel, LSGPegasusModel):
        with pytest.raises(ValueError, match=r"got model_type .*bart'; load it with LSGBartForConditionalGeneration$"):
            cls.from_pretrained(folder)


def test_a_plain_model_or_an_empty_folder_leads_to_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"got model_type 'bart'; lsg_attn\.models\.convert turns a plain model into"):
        LSGBartModel.from_pretrained(BASE)
    for load in (LSGBartModel.from_pretrained, convert):
        with pytest.raises(ValueError, match=r"got model_type None.*; is there a config\.json\?$"):
            load(tmp_path)


def test_trust_remote_code_runs_the_original_which_fails(tmp_path, monkeypatch):
    """Without the flag, the same folder loads."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    original = Path(importlib.util.find_spec("lsg_converter").origin).parent
    shutil.copytree(CONVERTED, folder := tmp_path / "published")
    shutil.copy(original / "bart/modeling_lsg_bart.py", folder)
    assert "AutoConfig" in json.loads((folder / "config.json").read_text())["auto_map"]
    with pytest.raises(
        (NameError, ModuleNotFoundError), match=r"'(BartConfig|transformers\.modeling_attn_mask_utils)'"
    ):
        AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    assert type(AutoConfig.from_pretrained(folder)) is LSGBartConfig


def test_lists_and_wrong_shapes_instead_of_a_batch():
    bart, bert = seq2seq(CONVERTED), LSGBertModel(LSGBertConfig(**SIZES)).eval()
    for model in (bart, bert):
        with pytest.raises(TypeError, match=r"input_ids: expected a torch\.Tensor, got list; .*'pt', padding=True$"):
            model([[5, 6, 7], [5, 6]])
        for ids in (IDS[0], IDS[:, :0]):
            shape = re.escape(str(tuple(ids.shape)))
            with pytest.raises(ValueError, match=rf"input_ids: expected shape \(batch, T\) with T >= 1, got {shape}"):
                model(ids)
        with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \(batch, T, width\) with T >= 1, got"):
            model(inputs_embeds=torch.randn(2, 32))
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(batch, T\) = \(2, 30\), got \(2, 31\)"):
            model(IDS, torch.ones(2, 31))
    batch = AutoTokenizer.from_pretrained(CONVERTED)(["a fox", "the lazy dog"], return_tensors="pt", padding=True)
    assert bart(**batch).logits.shape[0] == 2
    with pytest.raises(TypeError, match=r"got BatchEncoding; pass what a tokenizer returns as model\(\*\*batch\)"):
        bart(batch)


def test_documents_and_labels_that_are_too_long():
    model = seq2seq(CONVERTED)
    advice = r"tokens, got 3000; truncate the document \(truncation=True, max_length=2048 of the tokenizer\) or extend"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=rf"expected at most max_position_embeddings=2048 {advice}"):
            call(torch.full((1, 3000), 5))
    expected = "decoder_input_ids: expected at most max_position_embeddings=2048 tokens, got 3000; truncate the labels"
    with pytest.raises(ValueError, match=expected):
        model(IDS, labels=torch.full((2, 3000), 5))
    assert model(IDS[:1], decoder_input_ids=torch.full((1, 2048), 5)).logits.shape[1] == 2048


def test_a_converted_tokenizer_cuts_at_the_models_length(tmp_path):
    """A plain one cuts at its own, and says nothing."""
    convert_checkpoint(BASE, tmp_path / "lsg", 1500)
    text = "fox " * 3000
    for folder, length in ((BASE, 1024), (tmp_path / "lsg", 1500)):
        assert len(AutoTokenizer.from_pretrained(folder)(text, truncation=True)["input_ids"]) == length


def test_a_document_shorter_than_the_globals():
    """Models bring global tokens of their own; use_lsg takes the document's first."""
    assert seq2seq(CONVERTED, num_global_tokens=8)(IDS[:1, :1]).encoder_last_hidden_state.shape[1] == 9
    if Version(transformers.__version__) >= Version("5.0.1"):
        encoder = use_lsg(BertModel(BertConfig(**SIZES)), LSGPattern(8, 8, 2, num_global_tokens=64))
        with pytest.raises(ValueError, match="num_global_tokens: expected at most the sequence's length 30, got 64"):
            encoder(IDS)


def test_kernels_on_a_cpu():
    model = seq2seq(CONVERTED, attention_implementation="triton")
    with pytest.raises(ValueError, match=r"implementation='triton' cannot run: .*device cpu.*; use 'auto' or 'torch'"):
        model(IDS)


def test_half_precision_on_a_cpu_and_a_prompt_for_the_decoder():
    model, prompt = seq2seq(CONVERTED), torch.tensor([[2, 0, 7]])
    out = model.generate(IDS[:1], decoder_input_ids=prompt, max_new_tokens=2)
    assert torch.equal(out[:, :3], prompt)
    expected = model(IDS).logits
    assert (model.half()(IDS).logits - expected).abs().max() < 0.01 * expected.abs().max()


def test_pipelines_of_summaries():
    """transformers 5 has none, and says so; before, they work."""
    model, tokenizer = seq2seq(CONVERTED), AutoTokenizer.from_pretrained(CONVERTED)
    if Version(transformers.__version__) >= Version("5"):
        with pytest.raises(KeyError, match="summarization"):
            pipeline("summarization", model=model, tokenizer=tokenizer)
    else:
        assert pipeline("summarization", model=model, tokenizer=tokenizer)("fox " * 3000, truncation=True)


@pytest.mark.parametrize("source", ["directory", "memory"])
def test_families_that_convert_does_not_have(source, tmp_path):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected one of BART, .*got model_type 'gpt2'.*; use_lsg gives other encoders"
    ):
        convert(tmp_path if source == "directory" else GPT2Model(config))


def test_a_folder_without_a_tokenizer():
    with pytest.raises(
        ValueError, match=r"which has none of .*; convert takes another one as tokenizer, .* --tokenizer$"
    ):
        convert(NORM)
