"""LSG models from transformers' own: what all of them share, and heads, which are transformers' own on an LSG body."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..checks import type_name
from .weights import load_weights


class LSGModel(PreTrainedModel):
    """What every LSG model has in common. Mixed into a model of transformers, its ``plain_class``."""

    plain_class: ClassVar[type[Any]]
    config_class: ClassVar[type[Any]]
    has_global_tokens: ClassVar[bool] = True

    def __init__(self, config: Any, **kwargs: Any) -> None:
        check_config(config, self.config_class)
        super().__init__(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, use_safetensors: bool | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers, except that pickles (``pytorch_model.bin``) are read only for ``use_safetensors=False``.

        Raises:
            OSError: as in transformers, or there are no safetensors, only a pickle.
            TypeError, ValueError: as in the configuration.
        """
        load = super().from_pretrained
        return load_weights(load, pretrained_model_name_or_path, *model_args, use_safetensors=use_safetensors, **kwargs)


class LSGHead(LSGModel):
    """A head of transformers on an LSG body of the class ``body_class``."""

    body_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        # transformers' constructor builds a plain body, which is replaced at once: one without layers costs little.
        super().__init__(_without_layers(config))
        self.config = config
        plain = self.base_model
        options = {"add_pooling_layer": plain.pooler is not None} if hasattr(plain, "pooler") else {}
        body = self.body_class(config, **options)
        body.packs_documents = self._takes_packed_documents(body)
        setattr(self, self.base_model_prefix, body)
        self.post_init()

    @classmethod
    def _takes_packed_documents(cls, body: Any) -> bool:
        """Whether the head computes on each token, or on the pooled output, but not on the batch's first token."""
        per_token = ("MaskedLM", "LMHeadModel", "CausalLM", "TokenClassification")
        pooled = ("SequenceClassification", "PreTraining", "NextSentencePrediction")
        name = cls.plain_class.__name__
        return name.endswith(per_token) or (name.endswith(pooled) and getattr(body, "pooler", None) is not None)


def lsg_head(plain_class: type[Any], body_class: type[Any], base: type[LSGHead] = LSGHead) -> Any:
    """transformers' model with a head, such as BertForMaskedLM, on an LSG body: ``LSGBertForMaskedLM``."""
    return _subclass(
        base,
        plain_class,
        body_class,
        f"on :class:`{body_class.__name__}`, for long documents.",
        body_class=body_class,
        _no_split_modules=body_class._no_split_modules,
        supports_gradient_checkpointing=body_class.supports_gradient_checkpointing,
    )


def lsg_decoder(plain_class: type[Any], body_class: type[Any]) -> Any:
    """transformers' decoder alone, such as BartForCausalLM, with the configuration of an LSG model.

    It has no global tokens. A checkpoint of a whole model stores the embeddings as ``model.shared``, and like the plain
    class, this one does not look there: transformers warns that the embeddings are newly initialised.
    """
    doc = "with an LSG model's configuration; see :func:`lsg_attn.models.heads.lsg_decoder`."
    return _subclass(LSGModel, plain_class, body_class, doc, has_global_tokens=False)


def _subclass(base: type[LSGModel], plain_class: type[Any], body: type[Any], doc: str, **namespace: Any) -> Any:
    """``LSG`` and the name of ``plain_class``, in the module and with the configuration of ``body``."""
    namespace |= {
        "__module__": body.__module__,
        "__doc__": f":class:`transformers.{plain_class.__name__}` {doc}",
        "plain_class": plain_class,
        "config_class": body.config_class,
    }
    return type(f"LSG{plain_class.__name__}", (base, plain_class), namespace)


def check_config(config: Any, expected: type[Any]) -> None:
    """Check a model's configuration.

    Raises:
        TypeError: it is not of the class ``expected``.
    """
    if not isinstance(config, expected):
        article = "an" if expected.__name__.startswith("LSG") else "a"
        raise TypeError(f"config: expected {article} {expected.__name__}, got {type_name(config)}")


def _without_layers(config: Any) -> Any:
    """A copy of a configuration with no layers."""
    shallow = copy.copy(config)
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(shallow, name):
            setattr(shallow, name, 0)
    return shallow
