"""Registration with transformers' Auto classes: LSG-BART checkpoints never load as plain BART."""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartTokenizer,
    BartTokenizerFast,
)

from .bart import (
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
)
from .configuration import LSGBartConfig, is_published_lsg, upgrade_config_dict

_PLAIN_CONFIG: Any = CONFIG_MAPPING[BartConfig.model_type]  # BartConfig, unless other code registered its own


class BartOrLSGConfig(BartConfig):
    """The class that AutoConfig uses for "bart": an LSGBartConfig for an lsg-converter checkpoint, else a BartConfig.

    The class has no instances. It changes the result only for checkpoints that lsg-converter wrote.
    """

    # transformers prefers a class registered from outside transformers to a repository's own code, even with
    # trust_remote_code=True. With the plain class's module, BART repositories keep their own code.
    __module__ = _PLAIN_CONFIG.__module__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a plain configuration, as ``AutoConfig.for_model("bart")`` must."""
        return _PLAIN_CONFIG(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the contents of a ``config.json`` into an LSGBartConfig or a plain configuration."""
        if is_published_lsg(config_dict):
            return LSGBartConfig.from_dict(upgrade_config_dict(config_dict), **kwargs)
        return _PLAIN_CONFIG.from_dict(config_dict, **kwargs)


def register() -> None:
    """Register LSG-BART with the Auto classes. A second call changes nothing."""
    AutoConfig.register(LSGBartConfig.model_type, LSGBartConfig, exist_ok=True)
    AutoConfig.register(BartConfig.model_type, BartOrLSGConfig, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, LSGBartModel),
        (AutoModelForCausalLM, LSGBartForCausalLM),
        (AutoModelForMaskedLM, LSGBartForConditionalGeneration),
        (AutoModelForQuestionAnswering, LSGBartForQuestionAnswering),
        (AutoModelForSeq2SeqLM, LSGBartForConditionalGeneration),
        (AutoModelForSequenceClassification, LSGBartForSequenceClassification),
    ):
        auto_class.register(LSGBartConfig, model_class, exist_ok=True)
    AutoTokenizer.register(
        LSGBartConfig, slow_tokenizer_class=BartTokenizer, fast_tokenizer_class=BartTokenizerFast, exist_ok=True
    )
