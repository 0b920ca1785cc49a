"""LSG models for transformers, of every family that lsg-converter has.

Importing this package registers them with the Auto classes, which then load published LSG checkpoints as LSG models.
"""

try:
    import transformers
    from packaging.version import Version
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "packaging"):
        raise  # something that transformers needs: its own error says what to install
    raise ModuleNotFoundError(
        f"lsg_attn.models needs {error.name}: pip install 'lsg-attn[models]'", name=error.name
    ) from error

if (found := Version(transformers.__version__)) < Version("4.44.2") or found == Version("5.0.0"):
    # transformers 5.0.0 does not tie the weights of old .bin checkpoints
    raise ImportError(
        f"lsg_attn.models: expected transformers >= 4.44.2 other than 5.0.0, got {found}; pip install --upgrade "
        "transformers"
    )

from .albert import (
    LSGAlbertConfig,
    LSGAlbertForMaskedLM,
    LSGAlbertForMultipleChoice,
    LSGAlbertForPreTraining,
    LSGAlbertForQuestionAnswering,
    LSGAlbertForSequenceClassification,
    LSGAlbertForTokenClassification,
    LSGAlbertModel,
)
from .auto import register
from .bart import (
    LSGBartConfig,
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartForSequenceClassification,
    LSGBartModel,
)
from .bert import (
    LSGBertConfig,
    LSGBertForMaskedLM,
    LSGBertForMultipleChoice,
    LSGBertForNextSentencePrediction,
    LSGBertForPreTraining,
    LSGBertForQuestionAnswering,
    LSGBertForSequenceClassification,
    LSGBertForTokenClassification,
    LSGBertLMHeadModel,
    LSGBertModel,
)
from .checkpoint import convert_checkpoint
from .conversion import convert
from .distilbert import (
    LSGDistilBertConfig,
    LSGDistilBertForMaskedLM,
    LSGDistilBertForMultipleChoice,
    LSGDistilBertForQuestionAnswering,
    LSGDistilBertForSequenceClassification,
    LSGDistilBertForTokenClassification,
    LSGDistilBertModel,
)
from .electra import (
    LSGElectraConfig,
    LSGElectraForCausalLM,
    LSGElectraForMaskedLM,
    LSGElectraForMultipleChoice,
    LSGElectraForPreTraining,
    LSGElectraForQuestionAnswering,
    LSGElectraForSequenceClassification,
    LSGElectraForTokenClassification,
    LSGElectraModel,
)
from .interface import register_attention, use_lsg
from .mbart import (
    LSGMBartConfig,
    LSGMBartForCausalLM,
    LSGMBartForConditionalGeneration,
    LSGMBartForQuestionAnswering,
    LSGMBartForSequenceClassification,
    LSGMBartModel,
)
from .parallel import parallelize
from .pegasus import (
    LSGPegasusConfig,
    LSGPegasusForCausalLM,
    LSGPegasusForConditionalGeneration,
    LSGPegasusModel,
)
from .roberta import (
    LSGCamembertConfig,
    LSGCamembertForCausalLM,
    LSGCamembertForMaskedLM,
    LSGCamembertForMultipleChoice,
    LSGCamembertForQuestionAnswering,
    LSGCamembertForSequenceClassification,
    LSGCamembertForTokenClassification,
    LSGCamembertModel,
    LSGRobertaConfig,
    LSGRobertaForCausalLM,
    LSGRobertaForMaskedLM,
    LSGRobertaForMultipleChoice,
    LSGRobertaForQuestionAnswering,
    LSGRobertaForSequenceClassification,
    LSGRobertaForTokenClassification,
    LSGRobertaModel,
    LSGXLMRobertaConfig,
    LSGXLMRobertaForCausalLM,
    LSGXLMRobertaForMaskedLM,
    LSGXLMRobertaForMultipleChoice,
    LSGXLMRobertaForQuestionAnswering,
    LSGXLMRobertaForSequenceClassification,
    LSGXLMRobertaForTokenClassification,
    LSGXLMRobertaModel,
)

__all__ = [
    "LSGAlbertConfig",
    "LSGAlbertForMaskedLM",
    "LSGAlbertForMultipleChoice",
    "LSGAlbertForPreTraining",
    "LSGAlbertForQuestionAnswering",
    "LSGAlbertForSequenceClassification",
    "LSGAlbertForTokenClassification",
    "LSGAlbertModel",
    "LSGBartConfig",
    "LSGBartForCausalLM",
    "LSGBartForConditionalGeneration",
    "LSGBartForQuestionAnswering",
    "LSGBartForSequenceClassification",
    "LSGBartModel",
    "LSGBertConfig",
    "LSGBertForMaskedLM",
    "LSGBertForMultipleChoice",
    "LSGBertForNextSentencePrediction",
    "LSGBertForPreTraining",
    "LSGBertForQuestionAnswering",
    "LSGBertForSequenceClassification",
    "LSGBertForTokenClassification",
    "LSGBertLMHeadModel",
    "LSGBertModel",
    "LSGCamembertConfig",
    "LSGCamembertForCausalLM",
    "LSGCamembertForMaskedLM",
    "LSGCamembertForMultipleChoice",
    "LSGCamembertForQuestionAnswering",
    "LSGCamembertForSequenceClassification",
    "LSGCamembertForTokenClassification",
    "LSGCamembertModel",
    "LSGDistilBertConfig",
    "LSGDistilBertForMaskedLM",
    "LSGDistilBertForMultipleChoice",
    "LSGDistilBertForQuestionAnswering",
    "LSGDistilBertForSequenceClassification",
    "LSGDistilBertForTokenClassification",
    "LSGDistilBertModel",
    "LSGElectraConfig",
    "LSGElectraForCausalLM",
    "LSGElectraForMaskedLM",
    "LSGElectraForMultipleChoice",
    "LSGElectraForPreTraining",
    "LSGElectraForQuestionAnswering",
    "LSGElectraForSequenceClassification",
    "LSGElectraForTokenClassification",
    "LSGElectraModel",
    "LSGMBartConfig",
    "LSGMBartForCausalLM",
    "LSGMBartForConditionalGeneration",
    "LSGMBartForQuestionAnswering",
    "LSGMBartForSequenceClassification",
    "LSGMBartModel",
    "LSGPegasusConfig",
    "LSGPegasusForCausalLM",
    "LSGPegasusForConditionalGeneration",
    "LSGPegasusModel",
    "LSGRobertaConfig",
    "LSGRobertaForCausalLM",
    "LSGRobertaForMaskedLM",
    "LSGRobertaForMultipleChoice",
    "LSGRobertaForQuestionAnswering",
    "LSGRobertaForSequenceClassification",
    "LSGRobertaForTokenClassification",
    "LSGRobertaModel",
    "LSGXLMRobertaConfig",
    "LSGXLMRobertaForCausalLM",
    "LSGXLMRobertaForMaskedLM",
    "LSGXLMRobertaForMultipleChoice",
    "LSGXLMRobertaForQuestionAnswering",
    "LSGXLMRobertaForSequenceClassification",
    "LSGXLMRobertaForTokenClassification",
    "LSGXLMRobertaModel",
    "convert",
    "convert_checkpoint",
    "parallelize",
    "use_lsg",
]

register()
register_attention()
