"""LSGBartConfig: BART's configuration with the LSG encoder's keys. It also reads published LSG checkpoints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import BartConfig

from ..checks import type_name
from ..functional import check_implementation
from ..pattern import LSGPattern

GLOBAL_ROWS = 512  # rows of encoder.global_embeddings in every checkpoint; a model uses the first G
_PATTERN_KEYS = tuple(field.name for field in fields(LSGPattern) if field.name != "causal")
_FLAGS = ("adaptive", "mask_first_token", "pass_global_tokens_to_decoder", "pool_with_global")
LSG_KEYS = (*_PATTERN_KEYS, *_FLAGS, "attention_implementation")


class LSGBartConfig(BartConfig):
    """Configuration of an LSG-BART: the keys of :class:`transformers.BartConfig` and those of the LSG encoder.

    It also reads the format of lsg-converter 0.1.9 (``"model_type": "bart"``, ``"base_model_prefix": "lsg"`` and an
    ``auto_map``). It always writes ``"model_type": "lsg_bart"``.

    Args:
        block_size, sparse_block_size, sparsity_factor, sparsity_type, lsh_num_pre_rounds, lsh_seed: as in
            :class:`lsg_attn.LSGPattern`; a ``sparsity_type`` of None means ``"none"``.
        num_global_tokens: G, the number of global tokens before the document's tokens, 0 to 512.
        mask_first_token: whether token 0 (BOS) counts as padding, in the encoder and in cross-attention.
        pass_global_tokens_to_decoder: whether the encoder's output starts with the G global states.
        pool_with_global: whether the state of global token 0 replaces the first token's state when the global states
            are not passed to the decoder.
        adaptive: has no effect, since every length works. It is kept because published checkpoints have it.
        attention_implementation: the encoder's implementation, as in :func:`lsg_attn.lsg_attention`. It is not saved:
            it depends on the machine, not on the checkpoint.
        **kwargs: BART's keys.

    Raises:
        TypeError: a key above has a value of the wrong type.
        ValueError: a key above is out of range, or two keys contradict each other.
    """

    model_type = "lsg_bart"

    def __init__(
        self,
        *,
        block_size: int = 128,
        sparse_block_size: int = 128,
        sparsity_factor: int = 2,
        sparsity_type: str | None = "norm",
        num_global_tokens: int = 1,
        lsh_num_pre_rounds: int = 1,
        lsh_seed: int = 0,
        mask_first_token: bool = False,
        pass_global_tokens_to_decoder: bool = True,
        pool_with_global: bool = True,
        adaptive: bool = True,
        attention_implementation: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size
        self.sparse_block_size = sparse_block_size
        self.sparsity_factor = sparsity_factor
        self.sparsity_type = "none" if sparsity_type is None else sparsity_type
        self.num_global_tokens = num_global_tokens
        self.lsh_num_pre_rounds = lsh_num_pre_rounds
        self.lsh_seed = lsh_seed
        self.mask_first_token = mask_first_token
        self.pass_global_tokens_to_decoder = pass_global_tokens_to_decoder
        self.pool_with_global = pool_with_global
        self.adaptive = adaptive
        self.attention_implementation = attention_implementation
        pattern = self.lsg_pattern()
        for key in _PATTERN_KEYS:
            setattr(self, key, getattr(pattern, key))  # a numpy integer becomes an int, which JSON can store

    def lsg_pattern(self) -> LSGPattern:
        """The encoder's pattern, after the current values of all the encoder's keys have been checked.

        Raises:
            TypeError, ValueError: as in the constructor.
        """
        pattern = LSGPattern(**{key: getattr(self, key) for key in _PATTERN_KEYS})
        for key in _FLAGS:
            if not isinstance(value := getattr(self, key), bool):
                raise TypeError(f"{key}: expected a bool, got {value!r} ({type_name(value)})")
        check_implementation(self.attention_implementation, "attention_implementation")
        if pattern.num_global_tokens > GLOBAL_ROWS:
            raise ValueError(f"num_global_tokens: expected at most {GLOBAL_ROWS}, got {pattern.num_global_tokens}")
        if self.mask_first_token and not self.pool_with_global:
            raise ValueError("pool_with_global: expected True with mask_first_token=True, got False")
        if self.pool_with_global and not self.pass_global_tokens_to_decoder and not pattern.num_global_tokens:
            raise ValueError("num_global_tokens: expected at least 1 for pool_with_global=True, got 0")
        return pattern

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, except that a configuration from lsg-converter is returned in this library's format.

        Raises:
            ValueError: the directory is not that of an LSG-BART.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return upgrade_config_dict(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that the encoder's keys in ``kwargs`` are checked together with all others.

        Raises:
            TypeError, ValueError: as in the constructor.
        """
        overrides = {key: kwargs.pop(key) for key in LSG_KEYS if key in kwargs}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Whether all keys are equal. Since transformers 5 the inherited method compares only BART's keys."""
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without ``attention_implementation``."""
        out: dict[str, Any] = super().to_dict()
        out.pop("attention_implementation", None)
        return out


def is_published_lsg(config_dict: dict[str, Any]) -> bool:
    """Whether this is the configuration of an LSG-BART that lsg-converter wrote."""
    names = config_dict.get("architectures") or ()
    return config_dict.get("model_type") == "bart" and (
        config_dict.get("base_model_prefix") == "lsg" or any(name.startswith("LSGBart") for name in names)
    )


def upgrade_config_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Bring an LSG-BART configuration from this library or from lsg-converter into this library's format.

    Raises:
        ValueError: it is the configuration of another model.
    """
    if config_dict.get("model_type") == LSGBartConfig.model_type:
        return config_dict
    if not is_published_lsg(config_dict):
        raise ValueError(
            "expected the directory of an LSG-BART (model_type 'lsg_bart', or 'bart' with base_model_prefix 'lsg'), "
            f"got model_type {config_dict.get('model_type')!r}; lsg_attn.bart.convert turns a BART into an LSG-BART"
        )
    # With auto_map, transformers would look for the original's code.
    kept = {key: value for key, value in config_dict.items() if key not in ("auto_map", "base_model_prefix")}
    return {**kept, "model_type": LSGBartConfig.model_type}
