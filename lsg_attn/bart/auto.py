"""Registration with transformers' Auto classes, so that LSG-BART directories never load as plain BART."""

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

from .configuration import LSGBartConfig, is_published_lsg, modernised
from .modeling import (
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
)

_PLAIN_CONFIG: Any = CONFIG_MAPPING[BartConfig.model_type]  # BartConfig, unless somebody has registered theirs


class BartOrLSGConfig(BartConfig):
    """What AutoConfig finds under "bart": makes an LSGBartConfig of what lsg-converter wrote, else a plain one.

    It has no instances. For every directory but lsg-converter's the result is what it was without it.
    """

    # From here on, transformers prefers code registered from elsewhere to a repository's own, even with
    # trust_remote_code=True. Other people's BARTs keep theirs.
    __module__ = _PLAIN_CONFIG.__module__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain configuration, as ``AutoConfig.for_model("bart")`` promises."""
        return _PLAIN_CONFIG(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in a directory's ``config.json``, of the class that it needs."""
        if is_published_lsg(config_dict):
            return LSGBartConfig.from_dict(modernised(config_dict), **kwargs)
        return _PLAIN_CONFIG.from_dict(config_dict, **kwargs)


def register() -> None:
    """Make the Auto classes know LSG-BART; again is no different from once."""
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
