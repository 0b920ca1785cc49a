"""LSG-BART for transformers: ``import lsg_attn.bart`` also registers it with the Auto classes."""

from .auto import register
from .configuration import LSGBartConfig
from .conversion import convert, convert_checkpoint
from .modeling import (
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
)

__all__ = [
    "LSGBartConfig",
    "LSGBartForCausalLM",
    "LSGBartForConditionalGeneration",
    "LSGBartForQuestionAnswering",
    "LSGBartForSequenceClassification",
    "LSGBartModel",
    "convert",
    "convert_checkpoint",
]

register()
