"""Fine-tune a long masked-language model, its documents and its weights shared out over processes; stop and go on.

    lsg-attn convert bert-base-uncased lsg-bert --architecture BertForMaskedLM --max-length 16384
    torchrun --nproc-per-node 4 examples/train_sharded.py book.txt --model lsg-bert --output trained --context 2

Without a file, it reads Python's help. ``--context`` processes share each document, and the others read other ones at
the same time. Weights, gradients and AdamW's state are shared out over all processes (FSDP2, ``fully_shard``).

The folder ``--output`` has the newest state of the training, as step-N, and in the end the model. The same command goes
on from there, with the losses and the weights of a run that was never stopped: documents, masks and dropout follow from
the seed and the step alone. On several machines, that folder must be on a disk that they share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from token_ids import between_special_ids, ids_of, read_text
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging

from lsg_attn.distributed import shard
from lsg_attn.models import parallelize

HELP_BYTES = 460_000
MASKED = 0.15  # of a document's tokens
IGNORED = -100  # the label of all others


def seed_from(*what: object) -> int:
    """A seed that follows from a few numbers and names."""
    return random.Random(repr(what)).getrandbits(63)


class Documents:
    """Documents of equal length, and in which order and with which masks they are read.

    Args:
        ids: (tokens,) of the text. What is left at its end is not read.
        tokenizer: of the model.
        length: tokens of a document, CLS and SEP included.
        seed: of the order and the masks.

    Raises:
        ValueError: the text is shorter than a document.
    """

    def __init__(self, ids: Tensor, tokenizer: Any, length: int, seed: int) -> None:
        bodies = ids.unfold(0, length - 2, length - 2) if len(ids) >= length - 2 else ids[:0]
        if not len(bodies):
            raise ValueError(f"--tokens: expected at most {len(ids) + 2}, as the text has no more, got {length}")
        self.rows = torch.stack([between_special_ids(body, tokenizer) for body in bodies])
        self.mask_id, self.seed = tokenizer.mask_token_id, seed
        self.num_masked = max(round(MASKED * (length - 2)), 1)  # of each document

    def masked(self, number: int) -> tuple[Tensor, Tensor]:
        """Ids (1, length) of the document that is read as the ``number``-th, with masks, and the labels of these."""
        epoch, index = divmod(number, len(self.rows))
        order = torch.randperm(len(self.rows), generator=self._generator("epoch", epoch))
        ids, labels = self.rows[order[index]].clone(), torch.full_like(self.rows[0], IGNORED)
        chosen = 1 + torch.randperm(len(ids) - 2, generator=self._generator("mask", number))[: self.num_masked]
        labels[chosen] = ids[chosen]
        ids[chosen] = self.mask_id
        return ids.unsqueeze(0), labels.unsqueeze(0)

    def digest(self) -> str:
        """Tells other documents apart."""
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, *what))


class Checkpoints:
    """The states of a training, in folders step-N that get their names once they are whole. The newest one is kept.

    Args:
        folder: where they are.
        settings: what a training that goes on must have in common with the one that was stopped.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def newest_step(self) -> int:
        """The last step that is saved, as the first process sees the folder; 0 if none is."""
        step = [max(self._steps(), default=0)]
        dist.broadcast_object_list(step)
        return step[0]

    def save(self, step: int, model: Any, optimizer: Any) -> None:
        """Save the state after a step."""
        scratch = self._scratch()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=scratch)
        if dist.get_rank() == 0:
            (scratch / "settings.json").write_text(json.dumps(self.settings))
            old = self._steps()
            scratch.rename(self.path(step))
            for each in old:
                shutil.rmtree(self.path(each))

    def load(self, step: int, model: Any, optimizer: Any) -> None:
        """Load the state after a step.

        Raises:
            ValueError: it is of a training with other settings.
        """
        path = self.path(step)
        for name, x in json.loads((path / "settings.json").read_text()).items():
            if x != self.settings[name]:
                raise ValueError(f"{name}: expected {x!r}, as in {path}, got {self.settings[name]!r}")
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(state, checkpoint_id=path)
        if state["step"] != step:
            raise ValueError(f"{path}: expected the state after step {step}, got step {state['step']}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    def save_model(self, model: Any, tokenizer: Any) -> Path:
        """Save the model, whole, and its tokenizer, for transformers."""
        scratch, path = self._scratch(), self.folder / "model"
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            model.save_pretrained(scratch, state_dict=weights)
            tokenizer.save_pretrained(scratch)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
        return path

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _steps(self) -> list[int]:
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return [int(x[1]) for x in found if x]

    def _scratch(self) -> Path:
        """A folder to write to, without what an interrupted save left there."""
        scratch = self.folder / "unfinished.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        dist.barrier()
        return scratch


def share_out(model: Any, mesh: DeviceMesh) -> None:
    """Share out the documents over one dimension of a mesh, and the weights over all of it."""
    parallelize(model, mesh["context"], gather_outputs=False)
    everybody = init_device_mesh(mesh.device_type, (mesh.size(),))
    for layer in model.base_model.ordered_layers():
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)


def loss_of(model: Any, ids: Tensor, labels: Tensor, num_masked: int, mesh: DeviceMesh) -> Tensor:
    """This process's loss. The mean of all processes' is the mean over all masked tokens of all documents.

    Each document has ``num_masked`` of them, spread over ``context`` processes, which may have more or less each.
    """
    context = mesh["context"]
    own = shard(labels, context, pattern=model.config.lsg_pattern(), dim=1, has_globals=False)
    total = cross_entropy(model(ids).logits.flatten(0, 1).float(), own.flatten(), ignore_index=IGNORED, reduction="sum")
    return total * context.size() / num_masked


def train(
    model: Any,
    optimizer: Any,
    documents: Documents,
    checkpoints: Checkpoints,
    mesh: DeviceMesh,
    first: int,
    options: argparse.Namespace,
) -> None:
    """Do the steps after the one with the number ``first``."""
    row, rows = mesh["document"].get_local_rank(), mesh["document"].size()
    for step in range(first + 1, options.steps + 1):
        torch.manual_seed(seed_from(options.seed, "dropout", step, dist.get_rank()))
        ids, labels = (x.to(mesh.device_type) for x in documents.masked((step - 1) * rows + row))
        loss = loss_of(model, ids, labels, documents.num_masked, mesh)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {float(mean):.6f}", flush=True)
        if step % options.save_every == 0 or step == options.steps:
            checkpoints.save(step, model, optimizer)


def parsed_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, checked."""
    parser.add_argument("file", type=Path, nargs="?", help="a text in UTF-8 (default: Python's help)")
    parser.add_argument("--model", required=True, help="name or folder of an LSG encoder, as `lsg-attn convert` writes")
    parser.add_argument("--output", type=Path, required=True, help="folder for the states and the trained model")
    parser.add_argument("--context", type=int, help="how many processes share a document (default: all)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between saved states (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("expected to be started by torchrun, as in torchrun --nproc-per-node 4 examples/train_sharded.py")
    for name, least in (("tokens", 3), ("steps", 1), ("save_every", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    size = int(os.environ["WORLD_SIZE"])
    options.context = size if options.context is None else options.context
    if options.context < 1 or size % options.context:
        parser.error(f"--context: expected a divisor of the number of processes, {size}, got {options.context}")
    return options


def main() -> None:
    """Train the model and save it."""
    parser = argparse.ArgumentParser(description="Fine-tune a long masked-language model over processes of torchrun.")
    options = parsed_options(parser)
    if int(os.environ["RANK"]):
        logging.set_verbosity_error()  # the first process says it
    logging.disable_progress_bar()
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    size = dist.get_world_size()
    shape = (size // options.context, options.context)
    mesh = init_device_mesh(options.device, shape, mesh_dim_names=("document", "context"))

    try:
        text = read_text(options.file, HELP_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"expected a text file in UTF-8 at {options.file}: {error}")
    torch.manual_seed(options.seed)  # a head that the folder lacks is drawn, alike on all processes
    try:
        model = (
            AutoModelForMaskedLM.from_pretrained(options.model, dtype=torch.float32, use_safetensors=True)
            .to(options.device)
            .train()
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        share_out(model, mesh)
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"--model: expected an LSG encoder, as `lsg-attn convert` writes, got {options.model}: {error}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    try:
        encoder = model.base_model
        encoder.check_length(options.tokens, model.config.max_position_embeddings - encoder.position_offset())
        documents = Documents(ids_of(text, tokenizer), tokenizer, options.tokens, options.seed)
        settings = {"model": options.model, "text": documents.digest(), "processes": size}
        settings |= {name: getattr(options, name) for name in ("context", "tokens", "learning_rate", "seed")}
        checkpoints = Checkpoints(options.output, settings)
        first = checkpoints.newest_step()
        if first:
            checkpoints.load(first, model, optimizer)
    except ValueError as error:
        parser.error(str(error))
    train(model, optimizer, documents, checkpoints, mesh, first, options)
    path = checkpoints.save_model(model, tokenizer)
    if dist.get_rank() == 0:
        print(f"saved to {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
