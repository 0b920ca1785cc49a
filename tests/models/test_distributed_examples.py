"""The examples that share out documents over processes: the results of one process, and of a run that is not killed."""

import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from family_recordings import FOLDER, tiny
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from lsg_attn.models import LSGBertForMaskedLM, convert
from lsg_attn.models.bert import BERT
from lsg_attn.models.checkpoint import convert_checkpoint
from lsg_attn.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import long_document
import train_sharded
from processes import run_processes
from token_ids import ids_of, read_text
from train_sharded import IGNORED, Documents, loss_of, share_out

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = FOLDER / "bert/base_512"
# As torchrun tells a process that it is the only one; it then finds a port by itself.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
PATTERN = {"block_size": 32, "sparse_block_size": 32, "num_global_tokens": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny BERT for 4096 tokens, with dropout."""
    folder = tmp_path_factory.mktemp("model") / "lsg"
    convert_checkpoint(BASE, folder, 4096, architecture="BertForMaskedLM", **PATTERN)
    return folder


@pytest.fixture
def text(tmp_path):
    """About 20,000 tokens of the tiny tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text(read_text(None, 25_000), encoding="utf-8")
    return path


def start(processes, name, *arguments):
    """Start an example by torchrun; one process alone by itself, as torchrun would start it, which is faster."""
    command, env = [sys.executable], {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 1:
        env |= ALONE
    else:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(EXAMPLES / name), *map(str, arguments), "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def run(processes, name, *arguments, fails=False):
    """Run an example to its end and return its output."""
    with start(processes, name, *arguments) as process:
        out, _ = process.communicate(timeout=120)
    assert bool(process.returncode) is fails, out
    return out


def kill_all(process):
    """Kill torchrun and the processes that it started, each of which has a session of its own; return how many."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    pids = [process.pid, *map(int, found.stdout.split())]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)


def losses_of(out):
    return dict(re.findall(r"step (\d+): loss ([\d.]+)", out))


def embedding_of(out):
    return torch.tensor([float(x) for x in re.search(r"embedding: (.*) \.\.\.", out)[1].split()])


def test_long_document(checkpoint, text):
    """The same embedding from one process, from two, and without sharing anything out."""
    outs = [run(n, "long_document.py", text, "--model", checkpoint, "--tokens", 3333) for n in (1, 2)]
    model, tokenizer = convert(checkpoint, 4096)
    ids = tokenizer(text.read_text(), truncation=True, max_length=3333, return_tensors="pt").input_ids
    with torch.inference_mode():
        states = model.bert.eval()(ids).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.double().mean(0), dim=0)[:8].float()
    for out in outs:
        torch.testing.assert_close(embedding_of(out), expected, rtol=0, atol=1e-5)
    rows = re.findall(r"^ +([01]) +([\d,]+) +[\d,]+ +([\d,]+|n/a) +([\d,]+)$", outs[1], re.MULTILINE)
    assert [int(tokens.replace(",", "")) for _, tokens, _, _ in rows] == [53 * 32, 3333 - 53 * 32]
    assert all(int(received.replace(",", "")) > 0 for *_, received in rows)
    assert "3,333 tokens, 2 processes, cpu, torch.float32" in outs[1]


@pytest.fixture
def error_of(monkeypatch, capsys):
    """The error with which an example's main ends, as the only process, with some arguments."""

    def run_main(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments), "--device", "cpu"])
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert stop.value.code == 2
        return capsys.readouterr().err

    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    return run_main


def test_long_document_refuses(checkpoint, text, tmp_path, error_of, monkeypatch):
    main = long_document.main
    error = error_of(main, text, "--model", checkpoint)
    assert "expected at most max_position_embeddings=4096 tokens, got" in error
    assert "extend the model with lsg_attn.models.convert" in error
    error = error_of(main, tmp_path / "none", "--model", checkpoint)
    assert f"expected a text file in UTF-8 at {tmp_path / 'none'}: " in error
    for folder in (BASE, tmp_path):
        error = error_of(main, text, "--model", folder)
        assert f"--model: expected an LSG encoder, as `lsg-attn convert` writes, got {folder}: " in error
    error = error_of(main, text, "--model", checkpoint, "--tokens", 10**6)
    assert re.search(r"--tokens: expected at most \d+, as the text has no more, got 1000000", error)
    assert "--tokens: expected at least 3, got 2" in error_of(main, text, "--model", checkpoint, "--tokens", 2)
    monkeypatch.delenv("WORLD_SIZE")
    assert "expected to be started by torchrun" in error_of(main, text, "--model", checkpoint)


def test_training_refuses(checkpoint, text, tmp_path, error_of, monkeypatch):
    main, common = train_sharded.main, [text, "--model", checkpoint, "--output", tmp_path / "out"]
    error = error_of(main, *common, "--context", 3)
    assert "--context: expected a divisor of the number of processes, 1, got 3" in error
    error = error_of(main, *common, "--tokens", 5000)
    assert "expected at most max_position_embeddings=4096 tokens, got 5000" in error
    assert "--save-every: expected at least 1, got 0" in error_of(main, *common, "--save-every", 0)
    error = error_of(main, text, "--model", BASE, "--output", tmp_path / "out")
    assert f"--model: expected an LSG encoder, as `lsg-attn convert` writes, got {BASE}: " in error
    monkeypatch.delenv("WORLD_SIZE")
    assert "expected to be started by torchrun" in error_of(main, *common)
    assert not (tmp_path / "out").exists()


def test_training_goes_on_after_a_kill(checkpoint, text, tmp_path):
    """The losses and, to the last bit, the weights of a run that was not stopped, though a save was cut off."""
    common = [text, "--model", checkpoint, "--tokens", 1000, "--steps", 6, "--save-every", 2, "--learning-rate", 1e-2]
    whole = run(2, "train_sharded.py", *common, "--output", tmp_path / "whole")
    assert list(losses_of(whole)) == list("123456")

    with start(2, "train_sharded.py", *common, "--output", tmp_path / "killed") as process:
        before = ""
        while "step 3" not in before:
            line = process.stdout.readline()
            assert line, before
            before += line
        assert kill_all(process) == 3
        before += process.stdout.read()
    assert "saved to" not in before
    (tmp_path / "killed/unfinished.tmp").mkdir(exist_ok=True)
    (tmp_path / "killed/unfinished.tmp/__0_0.distcp").write_bytes(b"half of it")
    out = run(2, "train_sharded.py", *common, "--output", tmp_path / "killed")
    assert 2 < int(next(iter(losses_of(out)))) <= 6
    assert losses_of(whole) == losses_of(before) | losses_of(out)
    expected, got = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["model", "step-6"]

    trained = LSGBertForMaskedLM.from_pretrained(tmp_path / "killed/model").state_dict()
    plain = LSGBertForMaskedLM.from_pretrained(checkpoint).state_dict()
    assert trained.keys() == plain.keys()
    assert not torch.equal(
        trained["bert.embeddings.word_embeddings.weight"], plain["bert.embeddings.word_embeddings.weight"]
    )

    out = run(2, "train_sharded.py", *common, "--output", tmp_path / "killed", "--seed", 1, fails=True)
    assert f"seed: expected 0, as in {tmp_path / 'killed/step-6'}, got 1" in out
    assert not losses_of(out)


def check_gradients(everybody, documents):
    """The gradients of the mean over all masked tokens, whether processes share documents or read different ones."""
    plain = tiny(BERT, LSGBertForMaskedLM).double().train()
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("document", "context"))
        batch = [documents.masked(i) for i in range(shape[0])]
        ids, labels = (torch.cat(x) for x in zip(*batch, strict=True))
        plain.zero_grad()
        expected = cross_entropy(plain(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        expected.backward()
        model = copy.deepcopy(plain)
        share_out(model, mesh)
        model.zero_grad()
        loss = loss_of(model, *batch[mesh["document"].get_local_rank()], documents.num_masked, mesh)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach().to(mean))
        for (name, got), p in zip(model.named_parameters(), plain.parameters(), strict=True):
            if p.grad is not None:
                assert_close(name, got.grad.full_tensor(), p.grad, 1e-5)


def test_gradients(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = ids_of(read_text(None, 3000), tokenizer).clamp(max=98)
    run_processes(2, [check_gradients], tmp_path, Documents(ids, tokenizer, 203, seed=0))


def test_documents():
    """Each epoch reads every document once, in an order of its own; masks are drawn anew."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = ids_of("one two three " * 100, tokenizer)
    documents = Documents(ids, tokenizer, 52, seed=0)
    count = len(ids) // 50
    assert len(documents.rows) == count > 5
    seen = []
    for number in range(2 * count):
        masked, labels = documents.masked(number)
        assert int((labels != IGNORED).sum()) == documents.num_masked == round(0.15 * 50)
        assert (masked[labels != IGNORED] == tokenizer.mask_token_id).all()
        whole = torch.where(labels == IGNORED, masked, labels)[0]
        assert (whole[0], whole[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        seen.append(whole.tolist())
        assert all(map(torch.equal, documents.masked(number), (masked, labels)))
    for epoch in (seen[:count], seen[count:]):
        assert sorted(epoch) == sorted(documents.rows.tolist())
    with pytest.raises(
        ValueError, match=f"--tokens: expected at most {len(ids) + 2}, as the text has no more, got 9999"
    ):
        Documents(ids, tokenizer, 9999, seed=0)
    other = Documents(ids, tokenizer, 52, seed=1)
    assert any(not torch.equal(other.masked(i)[1], documents.masked(i)[1]) for i in range(count))


def test_pieces_of_a_text():
    """A text's ids do not depend on where it is cut."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = read_text(None, 200_000)
    assert len(text.encode()) in range(199_990, 200_001)
    assert ids_of(text, tokenizer).tolist() == tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    assert ids_of("", tokenizer).shape == (0,)
    assert len(ids_of("x" * 200_000, tokenizer)) > 0
