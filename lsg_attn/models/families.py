"""All families, and which of them a configuration or a model belongs to."""

from __future__ import annotations

from typing import Any

from .albert import ALBERT
from .bart import BART
from .bert import BERT
from .distilbert import DISTILBERT
from .electra import ELECTRA
from .family import Family
from .mbart import MBART
from .pegasus import PEGASUS
from .roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

FAMILIES = (BART, MBART, PEGASUS, BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, ELECTRA, DISTILBERT, ALBERT)


def family_of(config: Any) -> Family | None:
    """The family of a plain or LSG configuration, an object or the contents of a ``config.json``; or None."""
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    for family in FAMILIES:
        if model_type in (family.model_type, family.config_class.model_type):
            return family
    return None
