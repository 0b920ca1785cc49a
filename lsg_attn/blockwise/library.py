"""Builds the C++ of the block-wise implementation for the processor at hand, once, and loads it.

Nothing is built when the package is installed. The first call that can use the library compiles it, in about 10 s, to
PyTorch's folder for extensions (``TORCH_EXTENSIONS_DIR``), where later processes find it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

VARIABLE = "LSG_ATTN_CPP"  # "0": the library is neither built nor used
_FOLDER = Path(__file__).parent / "cpp"
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", *_AVX512, "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")
_log = logging.getLogger("lsg_attn")
_lock = threading.Lock()


def missing_reason() -> str | None:
    """Why the library cannot be used; None once it is loaded. The first call builds it, and logs what came of it."""
    if os.environ.get(VARIABLE) == "0":
        return f"the environment variable {VARIABLE} is 0"
    with _lock:
        return _load()


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the loaded library multiplies bfloat16 as it is; else it computes in float32."""
    return bool(operators().has_bfloat16_products())


@functools.cache
def operators() -> Any:
    """The loaded library's operators, in a namespace of its own: a process may hold two versions of it."""
    return getattr(torch.ops, _namespace())


@functools.cache
def _load() -> str | None:
    reason = _unsuitable_reason()
    if reason is None:
        try:
            path = _build()
            torch.ops.load_library(path)
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
            reason = f"the C++ does not compile: {first}"
        except OSError as error:
            reason = f"the C++ cannot be built or loaded: {error}"
    if reason is None:
        _log.info("attention on the CPU: compiled C++, %s", path)
    else:
        _log.warning("attention on the CPU: eager PyTorch, slower than compiled C++, as %s", reason)
    return reason


def _unsuitable_reason() -> str | None:
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        return f"the processor has no AVX-512 (PyTorch says {capability})"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if _compiler() is None:
        return "there is no C++ compiler (install g++, or name another in CXX)"
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def _build() -> Path:
    """Compile unless it was done before; several processes may do so at once."""
    namespace = _namespace()
    target = _cache() / namespace / "lsg_attn_cpp.so"
    if target.exists():
        return target
    _log.warning("compiling C++ for attention on this CPU, once, in about 10 s; %s=0 does without", VARIABLE)
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [str(_compiler()), *_FLAGS, f"-DLSG_NAMESPACE={namespace}", "-shared", "-Wl,--as-needed"]
        command += [str(_FOLDER / "operators.cpp"), "-o", str(built), "-isystem", str(root / "include")]
        # PyTorch's own OpenMP, under whatever name: a second one would have a second set of threads.
        command += [*map(str, root.glob("lib/libgomp*.so*")), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(target)
    return target


def _namespace() -> str:
    """A name for the operators that another version of the sources, of PyTorch or of the flags does not have."""
    sources = (path.read_text(encoding="utf-8") for path in sorted(_FOLDER.iterdir()))
    digest = hashlib.sha256("\0".join([torch.__version__, *_FLAGS, *sources]).encode()).hexdigest()
    return f"lsg_attn_cpp_{digest[:16]}"


def _cache() -> Path:
    """PyTorch's folder for extensions."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
