"""The block-wise implementations: in C++, fast on CPUs that it is compiled for, and in PyTorch, on any device."""
