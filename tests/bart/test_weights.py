"""No pickle is read, by any way to load a model, unless the caller asks for it."""

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import BASE, CONVERTED
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from lsg_attn.bart import LSGBartConfig, LSGBartForConditionalGeneration, convert
from lsg_attn.cli.main import main
from lsg_attn.models.conversion import load_tokenizer
from lsg_attn.models.families import FAMILIES
from lsg_attn.models.heads import LSGModel
from lsg_attn.models.seq2seq import LSGSeq2SeqModel

ADVICE = "if you trust its source, pass use_safetensors=False (lsg-attn convert: --no-use-safetensors)"


@pytest.fixture
def no_torch_load():
    """While a test runs, opening a pickle fails it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
        yield patch


def pickled(folder, source=CONVERTED, name="pytorch_model.bin", part="."):
    """A copy of a checkpoint with its weights in a pickle alone."""
    shutil.copytree(source, folder / part)
    torch.save(load_file(folder / part / "model.safetensors"), folder / part / name)
    (folder / part / "model.safetensors").unlink()
    return folder


def sharded(folder, index, shard):
    """A copy of the checkpoint whose weights are in one shard, a pickle, which an index names."""
    pickled(folder, name=shard)
    weight_map = dict.fromkeys(load_file(CONVERTED / "model.safetensors"), shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LAYOUTS = {
    "one file": (pickled, {}, {}, "pytorch_model.bin"),
    "a variant": (pickled, {"name": "pytorch_model.fp16.bin"}, {"variant": "fp16"}, "pytorch_model.fp16.bin"),
    "a subfolder": (pickled, {"part": "inner"}, {"subfolder": "inner"}, os.path.join("inner", "pytorch_model.bin")),
    "shards": (
        sharded,
        {"index": "pytorch_model.bin.index.json", "shard": "pytorch_model-00001-of-00001.bin"},
        {},
        "pytorch_model.bin.index.json",
    ),
}


@pytest.mark.parametrize(
    "load", [LSGBartForConditionalGeneration.from_pretrained, AutoModelForSeq2SeqLM.from_pretrained]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pickle_is_read_only_if_asked_for(layout, load, tmp_path, no_torch_load):
    make, how, where, name = LAYOUTS[layout]
    folder = make(tmp_path / "folder", **how)
    for asked in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match=re.escape(f"safetensors at {folder}, found {name}, a pickle; {ADVICE}")):
            load(folder, **where, **asked)
    no_torch_load.undo()
    model = load(folder, use_safetensors=False, **where)
    assert type(model) is LSGBartForConditionalGeneration
    expected = load_file(CONVERTED / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], x) for name, x in expected.items())


def test_a_pickle_by_its_own_name_or_in_an_index_of_safetensors_is_refused(tmp_path, no_torch_load):
    """transformers reads a file that a caller or an index names, also for use_safetensors=True."""
    file = pickled(tmp_path / "file") / "pytorch_model.bin"
    config = LSGBartConfig.from_pretrained(CONVERTED)
    with pytest.raises(OSError, match=r"found pytorch_model\.bin, which would be read as a pickle; if"):
        LSGBartForConditionalGeneration.from_pretrained(file, config=config)
    folder = sharded(tmp_path / "index", "model.safetensors.index.json", "weights.bin")
    with pytest.raises(OSError, match=r"found weights\.bin, which would be read as a pickle; if"):
        LSGBartForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("source", [BASE, CONVERTED])
def test_a_configuration_that_names_a_pickle_is_refused(source, tmp_path, no_torch_load):
    """transformers 5 reads the file that is named there, also for use_safetensors=True."""
    folder = pickled(tmp_path / "folder", source, name="adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ValueError, match=r"transformers_weights: expected a file \*\.safetensors, got 'adapter_model"):
        convert(folder)
    if source == CONVERTED:
        with pytest.raises(ValueError, match="transformers_weights: expected a file"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)


def test_a_name_on_the_hub_is_treated_alike(tmp_path, no_torch_load):
    """What a download leaves in the cache stands for the Hub."""
    repository = tmp_path / "models--someone--lsg-bart"
    pickled(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    where = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(OSError, match=re.escape(f"at someone/lsg-bart, found pytorch_model.bin, a pickle; {ADVICE}")):
        LSGBartForConditionalGeneration.from_pretrained("someone/lsg-bart", **where)
    (repository / "snapshots/abc/pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"(?i)huggingface\.co"):  # transformers' own: there are no weights at all
        LSGBartForConditionalGeneration.from_pretrained("someone/lsg-bart", **where)


@pytest.mark.parametrize("source", [BASE, CONVERTED])
def test_convert_reads_a_pickle_only_if_asked_to(source, tmp_path, capsys):
    folder = pickled(tmp_path / "folder", source)
    with pytest.raises(OSError, match=re.escape(f"at {folder}, found pytorch_model.bin, a pickle; {ADVICE}")):
        convert(folder, 600)
    expected = convert(source, 600).model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in _states(convert(folder, 600, use_safetensors=False)))
    arguments = ["convert", str(folder), str(tmp_path / "lsg"), "--max-length", "600"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"found pytorch_model.bin, a pickle; {ADVICE}\n")
    assert not (tmp_path / "lsg").exists()
    main([*arguments, "--no-use-safetensors"])
    assert (tmp_path / "lsg/model.safetensors").exists()
    with pytest.raises(TypeError, match="use_safetensors: expected a bool, got int"):
        convert(folder, use_safetensors=0)


def _states(converted):
    return converted.model.state_dict().items()


def test_a_pickle_that_is_asked_for_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = pickled(tmp_path / "folder")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Exception, match=r"(?i)weights.only|unable to load weights"):
        LSGBartForConditionalGeneration.from_pretrained(folder, use_safetensors=False)
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()


def test_where_both_are_the_caller_says_which_is_read(tmp_path):
    shutil.copytree(CONVERTED, tmp_path / "both")
    states = load_file(CONVERTED / "model.safetensors")
    torch.save({name: x + 1 for name, x in states.items()}, tmp_path / "both/pytorch_model.bin")
    for use_safetensors, added in ((None, 0), (True, 0), (False, 1)):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "both", use_safetensors=use_safetensors)
        assert torch.equal(model.model.shared.weight, states["model.shared.weight"] + added)


def test_a_shard_that_is_missing_is_no_reason_to_read_a_pickle(tmp_path):
    shutil.copytree(CONVERTED, tmp_path / "part")
    (tmp_path / "part/model.safetensors").rename(tmp_path / "part/pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"model.shared.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "part/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError)) as error:
        LSGBartForConditionalGeneration.from_pretrained(tmp_path / "part")
    assert "pickle" not in str(error.value)


def test_states_in_memory_need_no_file(no_torch_load):
    model = LSGBartForConditionalGeneration.from_pretrained(CONVERTED)
    config, states = LSGBartConfig.from_pretrained(CONVERTED), model.state_dict()
    again = LSGBartForConditionalGeneration.from_pretrained(None, config=config, state_dict=dict(states))
    assert all(torch.equal(x, states[name]) for name, x in again.state_dict().items())


def test_every_class_loads_in_this_way():
    classes = {cls for family in FAMILIES for cls in family.models}
    classes |= {cls.encoder_class for cls in classes if issubclass(cls, LSGSeq2SeqModel)}
    assert len(classes) > 60
    assert {cls.from_pretrained.__func__ for cls in classes} == {LSGModel.from_pretrained.__func__}


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "~/model", "../model", "runs/7/model"])
def test_a_directory_that_is_not_there_is_named(path, tmp_path, monkeypatch, capsys):
    """A path that cannot be a name on the Hub is not called a malformed name, nor looked for there."""
    monkeypatch.chdir(tmp_path)
    message = f"expected the name of a model or its directory, got {path}, which does not exist"
    for load in (convert, load_tokenizer, LSGBartForConditionalGeneration.from_pretrained):
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            load(path)
    with pytest.raises(SystemExit) as stop:
        main(["convert", path, "lsg"])
    assert (stop.value.code, capsys.readouterr().err) == (2, f"lsg-attn: {message}\n")


def test_programs_read_safetensors_of_plain_models_too():
    """The Auto classes of the commands and the examples are told to read safetensors."""
    root = Path(__file__).parent.parent.parent
    found = {}
    for path in (*root.glob("examples/*.py"), *root.glob("lsg_attn/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.match(r"AutoModel\w*\.from_pretrained", ast.unparse(node.func)):
                found[f"{path}:{node.lineno}"] = any(
                    ast.unparse(keyword) == "use_safetensors=True" for keyword in node.keywords
                )
    assert len(found) >= 6
    assert all(found.values()), found
