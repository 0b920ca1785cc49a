"""Context parallelism for the models: the documents that an encoder reads are shared out over processes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checks import type_name
from ..communication import Group, group_of
from ..distributed import Mesh, answers_of, first_rows, gather, shard
from ..layer import LSGAttention
from ..sections import shares
from .encoder import LSGEncoder
from .sharing import Alone

Model = TypeVar("Model", bound=PreTrainedModel)


def parallelize(model: Model, mesh: Mesh | Group, *, gather_outputs: bool = True) -> Model:
    """Let an LSG model share out the documents of each batch over processes, in place.

    Every process calls the model with the same whole inputs. Its encoder embeds the tokens of its own, and each layer
    computes their states alone: see :func:`lsg_attn.distributed.context_parallel`. Decoders and heads run on each
    process. In training, wrap the model in DistributedDataParallel or ``fully_shard`` over the same mesh (or one that
    has it): gradients of parameters are to be averaged over its processes.

    Args:
        model: of an LSG class. Of an encoder-decoder, the encoder is shared out.
        mesh: a one-dimensional DeviceMesh, or a ProcessGroup; or a :class:`lsg_attn.communication.Group` of it, which
            then counts what this process gets from others.
        gather_outputs: whether the encoder's states leave it whole, on every process. If not, ``last_hidden_state`` has
            the process's own tokens, (batch, n, width), as :func:`lsg_attn.distributed.shard` shares them out, and so
            have the logits of heads that are per token; ``hidden_states`` are (batch, G + n, width); the pooled output
            is still that of the document.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an LSG model, or ``mesh`` of another type.
        ValueError: the mesh has more dimensions; or without ``gather_outputs``, the model has a decoder, or a head that
            reads whole documents.
    """
    encoders = [module for module in model.modules() if isinstance(module, LSGEncoder)]
    if not encoders:
        raise TypeError(f"model: expected an LSG model, got a {type_name(model)}")
    group = group_of(mesh)
    for encoder in encoders:
        if not gather_outputs and not encoder.packs_documents:
            raise ValueError("gather_outputs: expected True, as the model's head reads whole documents")
        if not gather_outputs and model.config.is_encoder_decoder and encoder is not model:
            raise ValueError("gather_outputs: expected True, as the decoder reads whole documents")
        encoder.sharing = Shared(encoder, group, is_whole=gather_outputs)
        for module in encoder.modules():
            if isinstance(module, LSGAttention):
                module.answers = answers_of(group)
    return model


class Shared(Alone):
    """A process that has a share of each document's tokens."""

    def __init__(self, encoder: LSGEncoder, group: Group, *, is_whole: bool) -> None:
        self._config, self._group, self._is_whole = encoder.config, group, is_whole
        self.has_first_token = is_whole or group.rank == 0

    def own(self, x: Any) -> Any:
        return None if x is None else shard(x, self._group, pattern=self._pattern, dim=1, has_globals=False)

    def first_token(self, num_tokens: int) -> int:
        return shares(num_tokens, self._group.size, self._pattern.block_size)[self._group.rank].start

    def before_layer(self, states: Tensor) -> Tensor:
        """With the globals' states of the first process: dropout has drawn other ones for those of others."""
        count = self._config.num_global_tokens
        return torch.cat([first_rows(states, self._group, count), states[:, count:]], dim=1)

    def after_layers(self, states: Tensor) -> Tensor:
        return gather(states, self._group, pattern=self._pattern, dim=1) if self._is_whole else states

    def first_state(self, states: Tensor) -> Tensor:
        return states[:, :1] if self._is_whole else first_rows(states, self._group, 1)

    @property
    def _pattern(self) -> Any:
        return self._config.lsg_pattern()
