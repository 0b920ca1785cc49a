"""What of a batch of documents an encoder computes: all of it, unless :func:`.parallel.parallelize` says otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Alone:
    """A process that has whole documents."""

    has_first_token = True  # whether the tokens of the states that leave the encoder begin with the first one

    def own(self, x: Any) -> Any:
        """This process's part of what is of tokens, (batch, T, ...); of None, None."""
        return x

    def first_token(self, num_tokens: int) -> int:
        """The number of this process's first token, of ``num_tokens``."""
        return 0

    def before_layer(self, states: Tensor) -> Tensor:
        """States (batch, G + n, width) as all processes agree on them, in training."""
        return states

    def after_layers(self, states: Tensor) -> Tensor:
        """States (batch, G + n, width) as they leave the encoder."""
        return states

    def first_state(self, states: Tensor) -> Tensor:
        """The states (batch, 1, width) of the documents' first tokens, out of those of tokens (batch, n, width)."""
        return states[:, :1]


ALONE = Alone()
