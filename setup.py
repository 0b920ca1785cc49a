"""Packaging: `lsg_attn` and, inside it, `lsg_attn.kernels` from the top-level folder kernels/."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"', (ROOT / "lsg_attn/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
TRANSFORMERS = "transformers>=4.44.2,!=5.0.0"

setup(
    name="lsg-attn",
    version=VERSION,
    description="Local + Sparse + Global attention for long documents",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["lsg_attn", "lsg_attn.bart", "lsg_attn.blockwise", "lsg_attn.cli", "lsg_attn.fused", "lsg_attn.kernels"],
    # A folder kernels/ with an __init__.py would hide Hugging Face's package of that name: see lsg_attn/kernels.py.
    package_dir={"lsg_attn": "lsg_attn", "lsg_attn.kernels": "kernels"},
    package_data={"lsg_attn": ["py.typed"], "lsg_attn.kernels": ["README.md"]},
    install_requires=[
        "torch>=2.5",
        "rich>=13",
        'triton>=3.4; sys_platform == "linux" and platform_machine in "x86_64 aarch64"',
    ],
    extras_require={
        "bart": [TRANSFORMERS],
        "plot": ["matplotlib>=3.7"],
        "bench": ["lsg-converter==0.1.9", "matplotlib>=3.7", "numpy>=1.24", TRANSFORMERS],
        "dev": [
            "accelerate>=0.33",
            "build>=1",
            "hypothesis>=6",
            "lsg-converter==0.1.9",
            "matplotlib>=3.7",
            "mypy>=1.10",
            "numpy>=1.24",
            "pytest>=8",
            "ruff>=0.12",
            TRANSFORMERS,
        ],
    },
    entry_points={"console_scripts": ["lsg-attn = lsg_attn.cli.main:main"]},
)
