"""The block-wise implementation, in PyTorch: fast on a CPU, right on any device."""
