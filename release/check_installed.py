"""Checks that an environment has the package as it was released, not a checkout: run it where no checkout is."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import lsg_attn

file = Path(lsg_attn.__file__)
if not file.is_relative_to(sys.prefix):
    sys.exit(f"expected lsg_attn in {sys.prefix}, got {file}")
if version("lsg-attn") != lsg_attn.__version__:
    sys.exit(f"expected version {version('lsg-attn')}, as installed, got {lsg_attn.__version__}")
python = ".".join(map(str, sys.version_info[:3]))
print(f"lsg-attn {lsg_attn.__version__}, Python {python}, torch {torch.__version__}: {file.parent}")
