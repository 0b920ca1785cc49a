"""The Auto classes after `import lsg_attn.bart`: LSG checkpoints load as LSG-BART, all others as before."""

import json
import shutil
import subprocess
import sys

import pytest
import transformers
from checkpoints import BASE, CLASSIFY, CONVERTED, NORM
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lsg_attn.bart import LSGBartConfig
from lsg_attn.models.auto import register

PAIRS = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForMaskedLM": "ForConditionalGeneration",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
    "AutoModelForSeq2SeqLM": "ForConditionalGeneration",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


@pytest.mark.parametrize(("auto", "head"), PAIRS.items())
def test_auto_classes_load_lsg_and_plain_checkpoints(auto, head):
    auto_class = getattr(transformers, auto)
    for folder in (NORM, CLASSIFY):
        assert type(auto_class.from_pretrained(folder)).__name__ == f"LSGBart{head}"
    plain = auto_class.from_pretrained(BASE)
    assert type(plain) is getattr(transformers, f"Bart{head}")
    assert type(plain.config) is BartConfig


def test_plain_configurations_are_untouched():
    for config in (AutoConfig.for_model("bart", d_model=64), CONFIG_MAPPING["bart"](d_model=64)):
        assert type(config) is BartConfig
        assert config.d_model == 64
    config, unused = AutoConfig.from_pretrained(BASE, d_model=64, what=1, return_unused_kwargs=True)
    assert type(config) is BartConfig
    assert (config.d_model, unused["what"]) == (64, 1)
    config.name_or_path = ""  # only AutoConfig sets it
    assert config.to_dict() == BartConfig.from_pretrained(BASE, d_model=64).to_dict()


def test_other_repositories_keep_their_own_code(tmp_path, monkeypatch):
    """A repository's own class loads with trust_remote_code=True, and only then."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "theirs"
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.TheirConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("from transformers import BartConfig\n\n\nclass TheirConfig(BartConfig): ...\n")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "TheirConfig"
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) is BartConfig


def test_tokenizer_class_defaults_to_barts(tmp_path):
    shutil.copytree(CONVERTED, tmp_path / "lsg")
    settings = json.loads((CONVERTED / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (tmp_path / "lsg/tokenizer_config.json").write_text(json.dumps(settings))
    text = "The quick brown fox"
    assert AutoTokenizer.from_pretrained(tmp_path / "lsg")(text) == AutoTokenizer.from_pretrained(CONVERTED)(text)


def test_registering_again_changes_nothing():
    register()
    assert type(AutoConfig.from_pretrained(NORM)) is LSGBartConfig
    assert type(AutoConfig.from_pretrained(BASE)) is BartConfig


@pytest.mark.parametrize(
    ("first", "expected"), [("", "BartForConditionalGeneration"), ("import lsg_attn.bart", "LSGBart")]
)
def test_only_the_import_makes_auto_classes_load_lsg_bart(first, expected):
    """Without the import, transformers silently loads a plain BART."""
    code = (
        f"{first}\nfrom transformers import AutoModelForSeq2SeqLM\n"
        f"print(type(AutoModelForSeq2SeqLM.from_pretrained({str(NORM)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith(expected)


def test_bart_config_of_an_lsg_directory_stays_plain():
    """Calling BartConfig directly gives a BartConfig: transformers is not patched."""
    assert type(BartConfig.from_pretrained(NORM)) is BartConfig
    assert type(AutoModelForSeq2SeqLM.from_config(BartConfig.from_pretrained(NORM))).__name__ == (
        "BartForConditionalGeneration"
    )
