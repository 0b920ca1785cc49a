"""Run the kernel tests without a GPU on what Triton compiles for one: `last_stage.py --cc 80 tests/kernels -k norm`.

As `python -m ttsem.sanitize pytest`, but ttsem executes TTGIR, the last stage before LLVM, in place of the first one:
layouts, pipelined loops, asynchronous copies and Hopper's products are in it, for one compute capability.
"""

import argparse
import sys

import pytest
from ttsem import mlir, sanitize


def main():
    """Pytest's exit status, or 1 if no kernel ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other arguments: pytest's.")
    parser.add_argument("--cc", type=int, required=True, help="the compute capability, such as 80")
    options, arguments = parser.parse_known_args()
    mlir.enable_generic_printing()  # before Triton caches a kernel: ttsem reads no other form
    with sanitize.session(options.cc) as session:
        code = pytest.main(["--last-stage", *arguments])
    print(f"sm_{options.cc}: {session.launches} launches, {session.races_unchecked} of them too large to find races in")
    return code or int(not session.launches)


if __name__ == "__main__":
    sys.exit(main())
