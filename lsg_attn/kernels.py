"""lsg_attn.kernels: a bridge to the Triton kernels, in lsg_attn/kernels/ once installed, in ../kernels in a checkout.

The folder ``kernels`` at the root of a checkout has no ``__init__.py`` on purpose: with one, transformers would take
it for Hugging Face's package of that name.
"""

from pathlib import Path

_INSTALLED = Path(__file__).parent / "kernels"
_CHECKOUT = Path(__file__).parent.parent / "kernels"

__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT)]
