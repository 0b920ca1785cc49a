"""LSGBartConfig: BART's configuration and the keys of its LSG encoder, also as published checkpoints wrote them."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from transformers import BartConfig

from ..checks import type_name
from ..functional import check_implementation
from ..pattern import LSGPattern

GLOBAL_ROWS = 512  # rows of encoder.global_embeddings in every checkpoint, however many are used
_PATTERN_KEYS = tuple(field.name for field in fields(LSGPattern))
_FLAGS = ("adaptive", "mask_first_token", "pass_global_tokens_to_decoder", "pool_with_global")
LSG_KEYS = (*_PATTERN_KEYS, *_FLAGS, "attention_implementation")


class LSGBartConfig(BartConfig):
    """Configuration of an LSG-BART: all of :class:`transformers.BartConfig`'s keys, and these of the encoder.

    It also reads what lsg-converter 0.1.9 wrote (``"model_type": "bart"``, ``"base_model_prefix": "lsg"`` and an
    ``auto_map``), and writes ``"model_type": "lsg_bart"``.

    Args:
        block_size, sparse_block_size, sparsity_factor, sparsity_type, lsh_num_pre_rounds, lsh_seed: as in
            :class:`lsg_attn.LSGPattern`; a ``sparsity_type`` of None means ``"none"``.
        num_global_tokens: G, rows of the global embeddings put before the tokens, 0 to 512.
        mask_first_token: token 0 (BOS) counts as padding, for the encoder and for cross-attention.
        pass_global_tokens_to_decoder: the encoder's output keeps the G global states in front.
        pool_with_global: where it does not, the first token's state is that of global token 0.
        adaptive: kept for the checkpoints that have it; every length works either way.
        attention_implementation: of the encoder, as in :func:`lsg_attn.lsg_attention`. Not saved: what can run belongs
            to the machine, not to the checkpoint.
        **kwargs: BART's keys.

    Raises:
        TypeError: one of the keys above is not of the type that it has by default.
        ValueError: one of them is out of range, or two do not go together.
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
        for key, value in asdict(self.lsg_pattern()).items():
            setattr(self, key, value)  # an int also where a numpy integer came, which JSON does not take

    def lsg_pattern(self) -> LSGPattern:
        """The encoder's pattern, after a check of all keys of the encoder as they are now.

        Raises:
            TypeError, ValueError: as the constructor does.
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
        """As in transformers; what lsg-converter wrote comes back as this library writes it.

        Raises:
            ValueError: the directory holds no LSG-BART.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return modernised(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but that overrides of the encoder's keys are checked together with the rest.

        Raises:
            TypeError, ValueError: as the constructor does.
        """
        overrides = {key: kwargs.pop(key) for key in LSG_KEYS if key in kwargs}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Whether all keys are equal; since transformers 5 the inherited one knows BART's only."""
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]  # can be changed

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without ``attention_implementation``."""
        out: dict[str, Any] = super().to_dict()
        out.pop("attention_implementation", None)
        return out


def is_published_lsg(config_dict: dict[str, Any]) -> bool:
    """Whether lsg-converter wrote this configuration of a BART."""
    names = config_dict.get("architectures") or ()
    return config_dict.get("model_type") == "bart" and (
        config_dict.get("base_model_prefix") == "lsg" or any(name.startswith("LSGBart") for name in names)
    )


def modernised(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an LSG-BART, by this library or lsg-converter, as this library writes it.

    Raises:
        ValueError: it is of another model.
    """
    if config_dict.get("model_type") == LSGBartConfig.model_type:
        return config_dict
    if not is_published_lsg(config_dict):
        raise ValueError(
            "expected the directory of an LSG-BART (model_type 'lsg_bart', or 'bart' with base_model_prefix 'lsg'), "
            f"got model_type {config_dict.get('model_type')!r}; lsg_attn.bart.convert makes one of a BART"
        )
    # auto_map would have transformers look for the original's code
    kept = {key: value for key, value in config_dict.items() if key not in ("auto_map", "base_model_prefix")}
    return {**kept, "model_type": LSGBartConfig.model_type}
