"""The configurations of LSG models: a plain model's keys and the encoder's. They also read published checkpoints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PretrainedConfig

from ..checks import type_name
from ..dispatch import check_implementation
from ..pattern import LSGPattern
from .family import GLOBAL_ROWS
from .weights import check_named_weights

_PATTERN_KEYS = tuple(field.name for field in fields(LSGPattern) if field.name != "causal")


class LSGConfig(PretrainedConfig):
    """The keys that every LSG configuration has besides those of the plain model's configuration.

    It also reads the format of lsg-converter 0.1.9 (a plain ``model_type``, ``"base_model_prefix": "lsg"`` and an
    ``auto_map``). It always writes its own ``model_type``, such as ``"lsg_bert"``.

    Args:
        block_size, sparse_block_size, sparsity_factor, sparsity_type, lsh_num_pre_rounds, lsh_seed: as in
            :class:`lsg_attn.LSGPattern`; a ``sparsity_type`` of None means ``"none"``.
        num_global_tokens: G, the number of global tokens before the document's tokens, 0 to 512.
        mask_first_token: whether token 0 (BOS, CLS) counts as padding, also in cross-attention.
        pool_with_global: whether the state of global token 0 replaces the first token's state where the global tokens'
            states are dropped.
        pass_global_tokens_to_decoder: whether the encoder's output starts with the G global states. In encoder-decoders
            only.
        adaptive: has no effect, since every length works. It is kept because published checkpoints have it.
        attention_implementation: the encoder's implementation, as in :func:`lsg_attn.lsg_attention`. It is not saved:
            it depends on the machine, not on the checkpoint.
        **kwargs: the plain model's keys. ``is_decoder=True`` makes the attention of an encoder-only model causal.

    Raises:
        TypeError: a key above has a value of the wrong type.
        ValueError: a key above is out of range, or two keys contradict each other.
    """

    title: ClassVar[str]
    plain_class: ClassVar[type[Any]]
    model_type: ClassVar[str]
    lsg_defaults: ClassVar[dict[str, Any]] = {
        **{field.name: field.default for field in fields(LSGPattern) if field.name in _PATTERN_KEYS},
        "mask_first_token": False,
        "pool_with_global": True,
        "adaptive": True,
        "attention_implementation": "auto",
    }

    def __init__(self, **kwargs: Any) -> None:
        values = {key: kwargs.pop(key, default) for key, default in self.lsg_defaults.items()}
        super().__init__(**kwargs)
        for key, value in values.items():
            setattr(self, key, "none" if key == "sparsity_type" and value is None else value)
        pattern = self.lsg_pattern()
        for key in _PATTERN_KEYS:
            setattr(self, key, getattr(pattern, key))  # a numpy integer becomes an int, which JSON can store

    @property
    def drops_global_tokens(self) -> bool:
        """Whether the encoder's output has no states of global tokens."""
        return not getattr(self, "pass_global_tokens_to_decoder", False)

    @property
    def causal_encoder(self) -> bool:
        """Whether the encoder's tokens see no later tokens."""
        return bool(getattr(self, "is_decoder", False))

    def lsg_values(self) -> tuple[Any, ...]:
        """The current values of all that the encoder's attention depends on."""
        return (*(getattr(self, key) for key in _PATTERN_KEYS), self.causal_encoder, self.attention_implementation)

    def lsg_pattern(self) -> LSGPattern:
        """The encoder's pattern, after the current values of all the encoder's keys have been checked.

        Raises:
            TypeError, ValueError: as in the constructor.
        """
        pattern = LSGPattern(**{key: getattr(self, key) for key in _PATTERN_KEYS}, causal=self.causal_encoder)
        for key in self.lsg_defaults:
            value = getattr(self, key)
            if isinstance(self.lsg_defaults[key], bool) and not isinstance(value, bool):
                raise TypeError(f"{key}: expected a bool, got {value!r} ({type_name(value)})")
        check_implementation(self.attention_implementation, "attention_implementation")
        if pattern.num_global_tokens > GLOBAL_ROWS:
            raise ValueError(f"num_global_tokens: expected at most {GLOBAL_ROWS}, got {pattern.num_global_tokens}")
        if self.mask_first_token and not self.pool_with_global:
            raise ValueError("pool_with_global: expected True with mask_first_token=True, got False")
        if self.pool_with_global and self.drops_global_tokens and not pattern.num_global_tokens:
            raise ValueError("num_global_tokens: expected at least 1 for pool_with_global=True, got 0")
        if (kind := getattr(self, "position_embedding_type", None) or "absolute") != "absolute":
            raise ValueError(f"position_embedding_type: expected 'absolute', got {kind!r}")
        return pattern

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, except that a configuration from lsg-converter is returned in this library's format.

        Raises:
            ValueError: the directory is not that of this class's LSG model.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return cls.upgrade_config_dict(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that the encoder's keys in ``kwargs`` are checked together with all others.

        Raises:
            TypeError, ValueError: as in the constructor, or the configuration names weights that are no safetensors.
        """
        check_named_weights(config_dict)
        overrides = {key: kwargs.pop(key) for key in cls.lsg_defaults if key in kwargs}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Whether all keys are equal. In transformers 5 the inherited method compares only the plain model's keys."""
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without ``attention_implementation``."""
        out: dict[str, Any] = super().to_dict()
        out.pop("attention_implementation", None)
        return out

    @classmethod
    def is_published(cls, config_dict: dict[str, Any]) -> bool:
        """Whether this is the configuration of this class's LSG model, written by lsg-converter."""
        names = config_dict.get("architectures") or ()
        return config_dict.get("model_type") == cls.plain_class.model_type and (
            config_dict.get("base_model_prefix") == "lsg" or any(name.startswith("LSG") for name in names)
        )

    @classmethod
    def upgrade_config_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Bring the configuration of an LSG model, from this library or lsg-converter, into this library's format.

        Raises:
            ValueError: it is the configuration of another model.
        """
        if config_dict.get("model_type") == cls.model_type:
            return config_dict
        if not cls.is_published(config_dict):
            plain, found = cls.plain_class.model_type, config_dict.get("model_type")
            if config_dict.get("base_model_prefix") == "lsg" or str(found).startswith("lsg_"):
                names = config_dict.get("architectures") or ["an Auto class of transformers"]
                advice = f"load it with {names[0]}"
            elif found is None:
                advice = "is there a config.json?"
            else:
                advice = "lsg_attn.models.convert turns a plain model into an LSG model"
            raise ValueError(
                f"expected the directory of an LSG-{cls.title} (model_type {cls.model_type!r}, or {plain!r} with "
                f"base_model_prefix 'lsg'), got model_type {found!r}; {advice}"
            )
        # With auto_map, transformers would look for the original's code.
        kept = {key: value for key, value in config_dict.items() if key not in ("auto_map", "base_model_prefix")}
        return {**kept, "model_type": cls.model_type}


class LSGSeq2SeqConfig(LSGConfig):
    """The keys of an encoder-decoder, whose encoder has LSG attention and is never causal: see :class:`LSGConfig`."""

    lsg_defaults: ClassVar[dict[str, Any]] = {**LSGConfig.lsg_defaults, "pass_global_tokens_to_decoder": True}

    @property
    def causal_encoder(self) -> bool:
        """False: ``is_decoder`` is about the decoder."""
        return False


def lsg_config(title: str, plain_class: type[Any], module: str, base: type[LSGConfig] = LSGConfig) -> Any:
    """The LSG configuration of a family: a subclass of ``base`` and of transformers' ``plain_class``.

    Args:
        title: the family's name, as messages give it.
        plain_class: transformers' configuration.
        module: the module that holds the result, under its own name, for pickle.
        base: the keys to add.
    """
    return type(
        f"LSG{plain_class.__name__}",
        (base, plain_class),
        {
            "__module__": module,
            "__doc__": f":class:`transformers.{plain_class.__name__}` with the keys of :class:`{base.__name__}`.",
            "model_type": f"lsg_{plain_class.model_type}",
            "title": title,
            "plain_class": plain_class,
            # transformers 5 makes each configuration a dataclass, which would replace what a class merely inherits
            "__init__": LSGConfig.__init__,
            "__eq__": LSGConfig.__eq__,
            "__hash__": None,
        },
    )
