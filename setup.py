"""Packaging: `lsg_attn` and, inside it, `lsg_attn.kernels` from the top-level folder kernels/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"', (ROOT / "lsg_attn/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
MATPLOTLIB = "matplotlib>=3.7"
MODELS = ["packaging>=20", "safetensors>=0.4"]
TRANSFORMERS = "transformers>=4.44.2,!=5.0.0"
# torch's builds for GPUs require the one version of Triton they work with, ROCm's under another name; only its CPU
# builds bring none. In the base requirements, PyPI's triton would conflict with the former or overwrite the latter.
TRITON = 'triton>=3.6; sys_platform == "linux" and platform_machine in "x86_64 aarch64"'

CODE_OR_LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)"
    r"|(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?!https?://)(?P<target>[^()\s]+)\)",
    re.DOTALL,
)


def for_an_index(readme: str) -> str:
    """Markdown without relative images and links, which have no base on a package index.

    An image becomes its text, a link to a file its text and the file's path, a link within the page its text.
    """

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        text, target = match["text"], match["target"]
        if match["image"]:
            return f"*Figure, in {target}: {text}*"
        return text if target.startswith("#") or target == text.strip("`") else f"{text} ({target})"

    return CODE_OR_LINK.sub(replace, readme)


setup(
    name="lsg-attn",
    version=VERSION,
    description="Local + Sparse + Global attention for long documents",
    long_description=for_an_index((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="the lsg_attn authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["attention", "long context", "sparse attention", "transformers", "pytorch", "triton", "bart", "bert"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2210.15497"},
    python_requires=">=3.10",
    packages=[*find_packages(include=["lsg_attn", "lsg_attn.*"]), "lsg_attn.kernels"],
    # A folder kernels/ with an __init__.py would hide Hugging Face's package of that name: see lsg_attn/kernels.py.
    package_dir={"lsg_attn": "lsg_attn", "lsg_attn.kernels": "kernels"},
    package_data={"lsg_attn": ["py.typed", "blockwise/cpp/*", "cli/pages/*"], "lsg_attn.kernels": ["README.md"]},
    install_requires=[
        "einops>=0.8",
        "rich>=13",  # for the command, which is always installed; small, pure Python, and not imported by the library
        "torch>=2.8",
    ],
    extras_require={
        "bart": [*MODELS, TRANSFORMERS],
        "models": [*MODELS, "transformers>=4.57.6,!=5.0.0"],
        "plot": [MATPLOTLIB],
        "triton": [TRITON],
        "bench": ["lsg-converter==0.1.9", MATPLOTLIB, "numpy>=1.24", TRANSFORMERS],
        "dev": [
            "accelerate>=0.33",
            "build>=1",
            "hypothesis>=6",
            "lsg-converter==0.1.9",
            "markdown-it-py>=3",
            MATPLOTLIB,
            "mypy>=1.10",
            "numpy>=1.24",
            *MODELS,
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.3",
            "peft>=0.17",
            "pytest>=8",
            "rouge-score>=0.1.2",
            "ruff>=0.12",
            "setuptools>=77",
            TRANSFORMERS,
            TRITON,
        ],
    },
    entry_points={"console_scripts": ["lsg-attn = lsg_attn.cli.main:main"]},
)
