"""python -m bench.gpu.small: each kernel on a small case, compared with the reference; to run under a sanitizer."""

from __future__ import annotations

import torch

from bench.measure import reason_of
from lsg_attn import LSGPattern
from lsg_attn.testing import assert_close, make_inputs, run_attention, run_reference

# One type for each way to compress keys: rows chosen by index, rows with weights, and hashed rows.
PATTERNS = [LSGPattern(sparsity_type=name) for name in ("norm", "bos_pooling", "lsh")]
TOKENS, HEADS, HEAD_DIM, DTYPE = 5 * 128 - 60, 2, 64, torch.bfloat16  # with a last block that is not whole


def main() -> int:
    """Run a forward and a backward of each type on the GPU. Return 1 if one failed or has a wrong result."""
    failed = 0
    for pattern in PATTERNS:
        length = pattern.num_global_tokens + TOKENS
        inputs = make_inputs(1, HEADS, length, HEAD_DIM, DTYPE, "right", num_kept=1 + pattern.num_global_tokens)
        on_gpu = inputs._replace(**{name: x.to("cuda") for name, x in inputs._asdict().items()})
        try:
            found = run_attention(on_gpu, pattern, implementation="triton")
            expected = run_reference(inputs, pattern)
            for name, x in found.items():
                assert_close(f"{pattern.sparsity_type}, {name}", x.cpu(), expected[name])
        except Exception as error:
            failed += 1
            print(f"failed: {pattern.sparsity_type}: {reason_of(error)}", flush=True)
        else:
            print(f"right: {pattern.sparsity_type}: {', '.join(found)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
