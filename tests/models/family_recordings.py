"""The tiny checkpoints in tests/goldens/encoders: what lsg-converter 0.1.9 published of ten families, and computed."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

import lsg_attn.models
from lsg_attn.models.families import FAMILIES

# A file under tests/goldens that the repository stores once, and the folders that hold it, too.
_SHARED = {
    "bart/base/generation_config.json": (
        "barthez/seq2seq_norm",
        "mbart/base_512",
        "mbart/seq2seq_bos_pooling_no_pass",
        "mbart/seq2seq_norm",
    ),
    "encoders/albert/converted/conversion.json": (
        "bert/converted",
        "distilbert/converted",
        "electra/converted",
        "mbart/converted",
        "pegasus/converted",
        "roberta/converted",
    ),
    "encoders/bert/base_512/special_tokens_map.json": (
        "distilbert/base_512",
        "electra/base_512",
    ),
    "encoders/bert/causal_norm/generation_config.json": ("bert/mlm_norm",),
    "encoders/distilbert/base_512/tokenizer.json": ("electra/base_512",),
    "encoders/distilbert/base_512/tokenizer_config.json": ("electra/base_512",),
    "encoders/pegasus/base_512/generation_config.json": (
        "pegasus/seq2seq_bos_pooling_no_pass",
        "pegasus/seq2seq_norm",
        "pegasus/seq2seq_stride_mask_first",
    ),
}


def _assemble():
    """A temporary folder of whole checkpoints, which is removed at exit."""
    goldens, folder = Path(__file__).parent.parent / "goldens", Path(tempfile.mkdtemp(prefix="lsg-attn-families-"))
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(goldens / "encoders", folder, dirs_exist_ok=True)
    for file, folders in _SHARED.items():
        for name in folders:
            shutil.copy(goldens / file, folder / name)
    return folder


FOLDER = _assemble()
CASES = sorted(path.parent for path in FOLDER.glob("*/*/io.npz"))
CONVERSIONS = sorted(path.parent for path in FOLDER.glob("*/*/conversion.json"))
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
GENERATE = {"max_new_tokens": 16, "min_new_tokens": 8, "do_sample": False}
SEQ2SEQ = [family for family in FAMILIES if "pass_global_tokens_to_decoder" in family.config_class.lsg_defaults]


def name_of(folder):
    return f"{folder.parent.name}-{folder.name}"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def class_of(folder):
    return getattr(lsg_attn.models, config_of(folder)["architectures"][0])


def recorded(folder):
    """The original's inputs by argument name, and its results."""
    with np.load(folder / "io.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    inputs = {name: arrays.pop(name) for name in INPUTS if name in arrays}
    return inputs, arrays


def load(folder, cls=None, **overrides):
    """A model in evaluation mode, after a check that its tensors are exactly those of the folder."""
    model, info = (cls or class_of(folder)).from_pretrained(folder, output_loading_info=True, **overrides)
    assert not any(info.values()), info
    return model.eval()


def tiny_config(family, **keys):
    """The configuration of a small random model of a family, without dropout."""
    sizes = (
        {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "init_std": 0.2}
        if family in SEQ2SEQ
        else {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    )
    if family.title == "DistilBERT":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}
    if family.title in ("ELECTRA", "ALBERT"):
        sizes |= {"embedding_size": 16, "summary_last_dropout": 0.0, "classifier_dropout_prob": 0.0}
    pattern = {"block_size": 16, "sparse_block_size": 16, "num_global_tokens": 3}
    ids = {
        "bos_token_id": 3,
        "eos_token_id": 2,
        "pad_token_id": 1 if family.position_offset or family.counts_padding else 0,
    }
    common = {"vocab_size": 99, "max_position_embeddings": 256}
    return family.config_class(**{**sizes, **common, **pattern, **ids, **keys})


def tiny(family, cls=None, **keys):
    """A small random model of a family in evaluation mode."""
    torch.manual_seed(0)
    return (cls or family.models[0])(tiny_config(family, **keys)).eval()


def document(batch=2, length=101, padding=30):
    """Ids (batch, length) without special ones, and a mask with padding at the end of the last row."""
    ids = torch.randint(5, 98, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    return ids, mask
