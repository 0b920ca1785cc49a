"""The Triton implementation: what it needs to run, and how a call becomes launches of the kernels."""
