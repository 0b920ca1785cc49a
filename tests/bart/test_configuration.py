"""LSGBartConfig: the keys that it accepts, its errors, and the files that it reads and writes."""

import copy
import json
import pickle

import numpy as np
import pytest
from checkpoints import BASE, NORM, seq2seq
from transformers import AutoConfig

from lsg_attn.bart import LSGBartConfig, LSGBartModel


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"sparsity_type": "mean"}, ValueError, "sparsity_type: expected one of"),
        ({"sparsity_type": 3}, TypeError, "sparsity_type: expected a str"),
        ({"block_size": 30, "sparsity_factor": 4}, ValueError, "sparsity_factor must divide block_size"),
        ({"sparse_block_size": -1}, ValueError, "sparse_block_size: expected an int >= 0"),
        ({"block_size": 64.0}, TypeError, "block_size: expected an int, got 64.0"),
        ({"num_global_tokens": 513}, ValueError, "num_global_tokens: expected at most 512, got 513"),
        ({"num_global_tokens": -1}, ValueError, "num_global_tokens: expected an int >= 0"),
        ({"mask_first_token": "yes"}, TypeError, "mask_first_token: expected a bool, got 'yes'"),
        ({"adaptive": None}, TypeError, "adaptive: expected a bool"),
        (
            {"mask_first_token": True, "pool_with_global": False},
            ValueError,
            "pool_with_global: expected True with mask_first_token=True",
        ),
        (
            {"num_global_tokens": 0, "pass_global_tokens_to_decoder": False},
            ValueError,
            "num_global_tokens: expected at least 1 for pool_with_global=True",
        ),
        ({"attention_implementation": "sdpa"}, ValueError, "attention_implementation: expected 'auto'"),
    ],
)
def test_errors_name_the_key(overrides, error, message):
    with pytest.raises(error, match=message):
        LSGBartConfig(**overrides)
    for load in (LSGBartConfig.from_pretrained, AutoConfig.from_pretrained, LSGBartModel.from_pretrained):
        with pytest.raises(error, match=message):
            load(NORM, **overrides)


def test_overrides_are_checked_together():
    """A sparsity_factor of 48 does not divide the checkpoint's block_size of 32, but it divides the new one."""
    model = seq2seq(sparsity_type="bos_pooling", block_size=96, sparsity_factor=48)
    pattern = model.model.encoder.layers[0].self_attn.pattern
    assert (pattern.sparsity_type, pattern.block_size, pattern.sparsity_factor) == ("bos_pooling", 96, 48)
    assert pattern.sparse_block_size == 32  # the checkpoint's


def test_configurations_are_equal_by_all_keys():
    config = LSGBartConfig(block_size=np.int64(64))
    assert config == LSGBartConfig(block_size=64)
    assert config != LSGBartConfig(block_size=32)
    assert config != LSGBartConfig(block_size=64, attention_implementation="reference")
    assert json.loads(config.to_json_string(use_diff=False))["block_size"] == 64  # an int, which JSON can store
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_a_changed_configuration_is_checked_when_a_model_is_built():
    config = LSGBartConfig.from_pretrained(NORM)
    config.block_size = 33
    with pytest.raises(ValueError, match="sparsity_factor must divide block_size"):
        LSGBartModel(config)


def test_unknown_model_arguments_are_refused():
    with pytest.raises(TypeError, match="blok_size"):
        LSGBartModel.from_pretrained(NORM, blok_size=64)


def test_published_and_saved_configurations_agree(tmp_path):
    published = LSGBartConfig.from_pretrained(NORM, attention_implementation="reference")
    published.save_pretrained(tmp_path)
    written = LSGBartConfig.from_pretrained(tmp_path)
    assert written.to_dict().items() >= {"block_size": 32, "model_type": "lsg_bart", "num_global_tokens": 1}.items()
    assert written.lsg_pattern() == published.lsg_pattern()
    assert (published.attention_implementation, written.attention_implementation) == ("reference", "auto")


def test_sparsity_type_null_means_no_sparse_part():
    assert LSGBartConfig(sparsity_type=None).lsg_pattern().sparsity_type == "none"


@pytest.mark.parametrize("directory", ["plain", "other"])
def test_other_models_are_refused(directory, tmp_path):
    folder, kind = BASE, "bart"
    if directory == "other":
        folder, kind = tmp_path, "pegasus"
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for cls in (LSGBartConfig, LSGBartModel):
        with pytest.raises(ValueError, match=rf"expected the directory of an LSG-BART.*got model_type '{kind}'"):
            cls.from_pretrained(folder)


def test_models_refuse_a_plain_configuration():
    with pytest.raises(TypeError, match="config: expected an LSGBartConfig, got BartConfig"):
        LSGBartModel(AutoConfig.from_pretrained(BASE))
