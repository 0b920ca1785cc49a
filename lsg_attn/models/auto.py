"""Registration with transformers' Auto classes: LSG checkpoints never load as plain models."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoConfig, AutoTokenizer

from .families import FAMILIES
from .family import Family

_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForMultipleChoice",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForNextSentencePrediction",
)


def register() -> None:
    """Register all families with the Auto classes. A second call changes nothing."""
    for family in FAMILIES:
        if family.config_class.model_type not in CONFIG_MAPPING:
            _register_models(family)
            _register_tokenizers(family)
            _register_configurations(family)


def _register_models(family: Family) -> None:
    """An Auto class that gives a plain model gives the LSG model of the same name, too."""
    by_plain_class = {cls.plain_class: cls for cls in family.models}
    for name in _AUTO_CLASSES:
        auto_class = getattr(transformers, name)
        plain_class = auto_class._model_mapping.get(family.config_class.plain_class, None)
        if plain_class in by_plain_class:
            auto_class.register(family.config_class, by_plain_class[plain_class], exist_ok=True)


def _register_tokenizers(family: Family) -> None:
    """The tokenizers of the plain model: a pair of classes, slow and fast; since transformers 5 one class."""
    found = TOKENIZER_MAPPING.get(family.config_class.plain_class, None)
    slow, fast = found if isinstance(found, tuple) else (found, None)
    AutoTokenizer.register(family.config_class, slow_tokenizer_class=slow, fast_tokenizer_class=fast, exist_ok=True)


def _register_configurations(family: Family) -> None:
    AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
    AutoConfig.register(family.model_type, _plain_or_lsg(family), exist_ok=True)


def _plain_or_lsg(family: Family) -> type[Any]:
    """The class that AutoConfig uses for a plain model's type.

    It has no instances. It changes the result only for checkpoints that lsg-converter wrote.
    """
    lsg_class = family.config_class
    plain_class: Any = CONFIG_MAPPING[family.model_type]  # transformers', unless other code registered its own

    def new(cls: type[Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return a plain configuration, as ``AutoConfig.for_model`` must."""
        return plain_class(*args, **kwargs)

    def from_dict(cls: type[Any], /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the contents of a ``config.json`` into an LSG or a plain configuration."""
        if lsg_class.is_published(config_dict):
            return lsg_class.from_dict(lsg_class.upgrade_config_dict(config_dict), **kwargs)
        return plain_class.from_dict(config_dict, **kwargs)

    namespace = {
        "__doc__": _plain_or_lsg.__doc__,
        # transformers prefers a class registered from outside transformers to a repository's own code, even with
        # trust_remote_code=True. With the plain class's module, repositories keep their own code.
        "__module__": plain_class.__module__,
        "__new__": new,
        "from_dict": classmethod(from_dict),
    }
    return type(f"{family.config_class.plain_class.__name__}OrLSG", (family.config_class.plain_class,), namespace)
