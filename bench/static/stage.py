"""A kernel after the compiler's first stage, as a digest: what the later stages make follows from it alone.

A change of a kernel's code often leaves what it is compiled to for most calls: a branch that they do not take. Then its
figures need not be found again. The first stage takes a tenth of a second, all stages take several.
"""

from __future__ import annotations

from hashlib import sha256

import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from bench.static.binary import target_of
from bench.static.calls import Kernel
from bench.static.key import code_of_figures, source_of


def stage_of(kernel: Kernel) -> str:
    """The digest, 16 hexadecimal digits, of all that decides a kernel's figures."""
    source, target, options = source_of(kernel.launch), kernel.label.target, kernel.launch.options
    backend = make_backend(target_of(target))
    parsed = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target_of(target), parsed, implementation, backend.get_module_map(), context)
    stages: dict[str, object] = {}
    backend.add_stages(stages, parsed, source.language)
    text = stages["ttir"](module, {"hash": "", **vars(parsed)}).str_nodebug()  # type: ignore[operator]
    first = sha256(f"{text}{sorted(options.items())!r}{target}".encode()).hexdigest()
    return sha256("\0".join((first, code_of_figures(), triton.__version__)).encode()).hexdigest()[:16]
