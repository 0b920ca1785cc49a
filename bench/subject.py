"""Turns a peer and a case into the step that is timed, and the check before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import FORWARD, TRAIN, TimedCase
from bench.peers.base import CHECK_SEED, VOCABULARY, AttentionPeer, EncoderPeer, Peer
from lsg_attn.testing import assert_close, make_inputs

CHECK_TOKENS = 1024  # whole blocks and windows of every peer, and long enough for its sparse attention


class DisagreementError(Exception):
    """A peer's result or gradient is wrong."""


@dataclass(frozen=True)
class Subject:
    """A peer that is ready to run. ``leaves``: the tensors that get gradients in a backward."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    setup_seconds: float  # for masks and the like, made once per shape; on a GPU with their compilation

    def clear_gradients(self) -> None:
        """Free the gradients of the last backward."""
        for leaf in self.leaves:
            leaf.grad = None


def make_subject(peer: Peer, case: TimedCase) -> Subject:
    """Make inputs and, for an encoder, weights; an encoder is in training mode only for a train step."""
    if isinstance(peer, AttentionPeer):
        q, k, v = leaves = _attention_inputs(case)
        begin = time.perf_counter()
        attend = peer.prepare(case)
        if case.device == "cuda":
            torch.cuda.synchronize()
        return Subject(lambda: attend(q, k, v), leaves, time.perf_counter() - begin)
    model, inputs = _model(peer, case)
    model.train(case.step == TRAIN)
    weights = tuple(weight for weight in model.parameters() if weight.requires_grad)
    return Subject(lambda: model(**inputs).last_hidden_state, weights, 0.0)


def make_step(subject: Subject, step: str) -> Callable[[], object]:
    """A case's step as a function; the gradients of its last call stay in the leaves."""
    for leaf in subject.leaves:
        leaf.requires_grad_(step != FORWARD)
    if step == FORWARD:
        return torch.no_grad()(subject.forward)
    if step == TRAIN:
        optimizer = torch.optim.AdamW(subject.leaves, lr=1e-5)

        def train() -> None:
            optimizer.zero_grad()
            subject.forward().float().square().mean().backward()
            optimizer.step()

        return train
    douts: list[Tensor] = []

    def forward_backward() -> None:
        subject.clear_gradients()
        out = subject.forward()
        if not douts:
            douts.append(torch.randn_like(out))
        out.backward(douts[0])

    return forward_backward


def check(peer: Peer, case: TimedCase) -> None:
    """Compare a peer's attention with the expected result, on a few blocks with a case's pattern, dtype and device.

    An encoder's attention is the one in its first layer, between its linear layers. If a backward is measured,
    gradients are compared too: those of queries, keys and values, or of an encoder's hidden states.

    Raises:
        DisagreementError: they differ by more than the dtype's tolerance.
    """
    tokens = max(CHECK_TOKENS, 6 * case.pattern.block_size)
    small = replace(case, tokens=tokens, batch=1, size_name="tiny", dtype_name=peer.checked_dtype(case))
    with torch.set_grad_enabled(case.step != FORWARD):
        run = _run_attention(peer, small) if isinstance(peer, AttentionPeer) else _run_first_layer(peer, small)
    exact = [x.detach().cpu().double().requires_grad_() for x in run.qkv]
    found, expected = {"out": run.out.detach()}, {"out": peer.expected(small, *exact)}
    if case.step != FORWARD:
        gradients = torch.autograd.grad(run.out, list(run.inputs.values()), _dout_like(run.out))
        found |= dict(zip(run.inputs, gradients, strict=True))
        gradients = torch.autograd.grad(expected["out"], exact, _dout_like(expected["out"]))
        expected |= dict(zip(run.inputs, run.to_inputs(gradients), strict=True))
    for name, x in found.items():
        try:
            assert_close(
                f"{peer.name}, {case.pattern.sparsity_type}, {small.dtype_name}, {name}", x.cpu(), expected[name]
            )
        except AssertionError as error:
            raise DisagreementError(str(error)) from error


class _Run(NamedTuple):
    """A peer's result on a short document, and its inputs. ``inputs`` are the tensors with gradients, by name."""

    out: Tensor  # (1, heads, length, head_dim), as q, k and v
    qkv: tuple[Tensor, ...]
    inputs: dict[str, Tensor]
    to_inputs: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]  # from gradients of qkv to those of inputs


def _run_attention(peer: AttentionPeer, case: TimedCase) -> _Run:
    inputs = make_inputs(1, case.size.heads, case.length, case.size.head_dim, case.dtype)
    qkv = tuple(x.to(case.device).requires_grad_(case.step != FORWARD) for x in inputs[:3])
    attend = peer.prepare(case)
    torch.manual_seed(CHECK_SEED)
    names = ("dquery", "dkey", "dvalue")
    return _Run(attend(*qkv), qkv, dict(zip(names, qkv, strict=True)), lambda gradients: gradients)


def _dout_like(out: Tensor) -> Tensor:
    """The same numbers for every dtype and device: rounded to bfloat16, then to float16."""
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().half()
    return dout.to(out.device, out.dtype)


def _run_first_layer(peer: EncoderPeer, case: TimedCase) -> _Run:
    """Run the attention of an encoder's first layer; its input with a gradient is the hidden states."""
    model, inputs = _model(peer, case)
    parts = peer.parts(model.eval())
    seen: dict[int, Tensor] = {}
    for part in (parts.query, parts.output):
        part.register_forward_pre_hook(lambda module, inputs: seen.update({id(module): inputs[0]}))
    torch.manual_seed(CHECK_SEED)
    model(**inputs)
    hidden, context = seen[id(parts.query)], seen[id(parts.output)]

    def split(x: Tensor) -> Tensor:
        out: Tensor = x.unflatten(-1, (case.size.heads, -1)).transpose(1, 2)
        return out

    def to_hidden(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights = (part.weight.detach().cpu().double() for part in parts[:3])
        each = [x.transpose(1, 2).flatten(2) @ weight for x, weight in zip(gradients, weights, strict=True)]
        return (sum(each[1:], each[0]).reshape(hidden.shape),)

    # Longformer's hidden states are (length, 1, width); the context is (1, length, width)
    qkv = tuple(split(part(hidden.reshape(context.shape))) for part in parts[:3])
    return _Run(split(context), qkv, {"dhidden": hidden}, to_hidden)


def _attention_inputs(case: TimedCase) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values (batch, heads, G+T, head_dim), with the strides that projections give."""
    torch.manual_seed(0)
    shape = case.batch, case.length, case.size.heads, case.size.head_dim
    q, k, v = (torch.randn(shape, dtype=case.dtype, device=case.device).transpose(1, 2) for _ in range(3))
    return q, k, v


def _model(peer: EncoderPeer, case: TimedCase) -> tuple[Any, dict[str, Tensor]]:
    """An encoder with random weights, and its arguments for random ids."""
    torch.manual_seed(0)
    with torch.device(case.device):
        model: nn.Module = peer.build(case)
        ids = torch.randint(10, VOCABULARY, (case.batch, case.tokens))
    return model.to(case.device, case.dtype), peer.inputs(ids)
