"""LSG-BART for transformers. Importing this package registers LSG-BART with the Auto classes."""

import transformers
from packaging.version import Version

if (found := Version(transformers.__version__)) < Version("4.44.2") or found == Version("5.0.0"):
    # transformers 5.0.0 does not tie the weights of old .bin checkpoints
    raise ImportError(f"lsg_attn.models: expected transformers >= 4.44.2 other than 5.0.0, got {found}")

from .auto import register
from .bart import (
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
)
from .configuration import LSGBartConfig
from .conversion import convert, convert_checkpoint

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
