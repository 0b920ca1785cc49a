"""What is known of the kernels without a GPU: what they compile to, and the floors under their times."""
