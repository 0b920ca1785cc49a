"""The few collectives of torch.distributed that sharing out a sequence takes: counted, and naming who failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .checks import type_name

# torch 2.13 has renamed it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Seconds that the processes that are left after a failure wait for each other's word.
_GRACE = 10.0
_KEY = "lsg_attn/left/{}"


class Message(NamedTuple):
    """Tensors to send to the process ``peer`` of the group, or the tensors to fill with what comes from it."""

    peer: int
    tensors: Sequence[Tensor]


class Group:
    """The processes that share out a sequence.

    Args:
        mesh: a one-dimensional DeviceMesh, or a ProcessGroup.

    Attributes:
        rank, size: this process's number among them, and how many there are.
        received_bytes, messages: what this process got from others so far, and in how many messages. In a collective,
            each other process sends one.

    Raises:
        TypeError: ``mesh`` is of another type.
        ValueError: it has more dimensions, or this process is not in it.
    """

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup) -> None:
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(
                    f"mesh: expected one dimension, got {mesh.ndim}: {mesh}; take one of it, as mesh['name'] does"
                )
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type_name(mesh)}")
        self._group = mesh
        self.rank, self.size = dist.get_rank(mesh), dist.get_world_size(mesh)
        if self.rank < 0:
            raise ValueError("mesh: expected one that this process is in")
        self.received_bytes = self.messages = 0

    def __deepcopy__(self, _: object) -> Group:
        """The same group: a copy of a model talks to the same processes."""
        return self

    def device_of_numbers(self, device: torch.device) -> torch.device:
        """Where numbers that Python reads are best sent from: the CPU, if the group can, or ``device``."""
        return torch.device("cpu") if "cpu" in str(dist.get_backend_config(self._group)) else device

    def all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to bring x of all processes, alike in shape and dtype, to each; what is returned waits for them.

        It then returns (size, *x.shape), in the order of the ranks.
        """
        out = x.new_empty(self.size, *x.shape)
        if x.numel() == 0:
            return lambda: out
        with self._failures():
            work: Any = _all_gather(_bytes(out), _bytes(x), group=self._group, async_op=True)
        self._count(_bytes(x).numel(), self.size - 1)

        def wait() -> Tensor:
            with self._failures():
                work.wait()
            return out

        return wait

    def broadcast(self, x: Tensor) -> None:
        """Fill x with that of rank 0."""
        with self._failures():
            dist.broadcast(_bytes(x), dist.get_global_rank(self._group, 0), group=self._group)
        if self.rank:
            self._count(_bytes(x).numel(), 1)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Start to send and to receive; what is returned waits for the end.

        The tensors of ``receives`` are then filled.
        """
        operations, buffers = [], []
        for message in sends:
            packed = torch.cat([_bytes(x) for x in message.tensors])
            operations.append(self._operation(dist.isend, packed, message.peer))
        for message in receives:
            size = sum(_bytes(x).numel() for x in message.tensors)
            packed = torch.empty(size, dtype=torch.uint8, device=message.tensors[0].device)
            buffers.append(packed)
            operations.append(self._operation(dist.irecv, packed, message.peer))
            self._count(packed.numel(), 1)
        with self._failures():
            works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work, operation in zip(works, operations, strict=False):  # NCCL has one for all
                with self._failures(operation.peer):
                    work.wait()
            for message, packed in zip(receives, buffers, strict=True):
                targets = [_bytes(x) for x in message.tensors]
                for x, part in zip(targets, packed.split([x.numel() for x in targets]), strict=True):
                    x.copy_(part)

        return wait

    def _operation(self, kind: Any, packed: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, packed, dist.get_global_rank(self._group, peer), self._group)

    def _count(self, size: int, messages: int) -> None:
        self.received_bytes += size * messages
        self.messages += messages

    @contextlib.contextmanager
    def _failures(self, peer: int | None = None) -> Iterator[None]:
        """Turn a failure of torch.distributed into one that names the processes that no longer answer."""
        try:
            yield
        except RuntimeError as error:
            self._name_the_lost(error)

    def _name_the_lost(self, error: RuntimeError) -> NoReturn:
        """Raise the RuntimeError of a group that lost processes: those that do not say that they are left."""
        ranks = dist.get_process_group_ranks(self._group)
        lost = ranks
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(_KEY.format(dist.get_rank()), "1")
            deadline = time.monotonic() + _GRACE
            while lost and time.monotonic() < deadline:
                lost = [rank for rank in lost if not store.check([_KEY.format(rank)])]
                time.sleep(0.05)
        except RuntimeError:
            lost = [0]  # it has the store, with which ranks find each other
        who = ", ".join(str(rank) for rank in lost)
        raise RuntimeError(
            f"context parallelism: rank {dist.get_rank()} lost rank {who} of {ranks}"
            if lost
            else f"context parallelism: ranks {ranks} are all left, but their exchange failed"
        ) from error


def group_of(mesh: DeviceMesh | dist.ProcessGroup | Group) -> Group:
    """The Group of a mesh, or what is one."""
    return mesh if isinstance(mesh, Group) else Group(mesh)


def _bytes(x: Tensor) -> Tensor:
    """The memory of x, which is contiguous, as bytes: any dtype can be sent so."""
    return x.view(-1).view(torch.uint8)
