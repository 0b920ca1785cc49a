"""What is known about the kernels without a GPU: what they compile to, and lower bounds of their times."""
