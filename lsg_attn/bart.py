"""LSG-BART for transformers, under the name that it had before :mod:`lsg_attn.models` held all families."""

from .models import (
    LSGBartConfig,
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
    convert,
    convert_checkpoint,
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
