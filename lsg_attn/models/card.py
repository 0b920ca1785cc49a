"""The model card of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__

_CARD = """---
library_name: transformers
tags:
- lsg
- long-context
---

# {name}

{source}, converted to LSG (Local + Sparse + Global) attention for documents of up to {max_length} tokens by
lsg_attn {version}. It was not trained after the conversion.

| | |
|---|---|
| class | `{model_class}` |
| tokens | {max_length} |
| block size | {block_size} |
| sparsity | `{sparsity_type}`, {sparse_block_size} keys on each side, one for every {sparsity_factor} tokens |
| global tokens | {num_global_tokens} |
| `mask_first_token` | {mask_first_token} |

## Load it

```python
import lsg_attn.models  # registers LSG models; without it transformers does not know the model type
from transformers import AutoTokenizer

model = lsg_attn.models.{model_class}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Limits

- The global tokens are untrained: they start from token and position embeddings. The first stands for the first token
  of the text. Each further one makes results worse until it is trained.
- Position embeddings past the plain model's length repeat those before.
"""


def model_card(model: Any, source: str | Path, name: str, max_length: int) -> str:
    """A README.md for a converted model.

    Args:
        model: the LSG model.
        source: the name or directory that it was converted from.
        name: the name or directory that it is saved as.
        max_length: the number of tokens in the longest document.
    """
    keys = ("block_size", "sparse_block_size", "sparsity_factor", "sparsity_type", "num_global_tokens")
    return _CARD.format(
        name=name,
        source=Path(source).name,
        max_length=max_length,
        version=__version__,
        model_class=type(model).__name__,
        mask_first_token=model.config.mask_first_token,
        **{key: getattr(model.config, key) for key in keys},
    )
