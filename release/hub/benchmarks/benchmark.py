"""LSG attention beside PyTorch's full attention: ``kernels benchmark`` times each ``benchmark_`` method."""

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD_DIM, BLOCK = 12, 64, 128


class LSGAttention(Benchmark):
    """On a GPU 16,385 tokens in bfloat16, on a CPU 2,049 in float32; one of them is global."""

    seed = 0

    def setup(self):
        """Inputs, and the pattern without a sparse part, whose attention PyTorch can compute with a mask."""
        length, dtype = (1 + 2048, torch.float32) if self.device == "cpu" else (1 + 16384, torch.bfloat16)
        shape = 4, 1, HEADS, length, HEAD_DIM
        *self.inputs, self.dout = torch.randn(shape, dtype=dtype, device=self.device)
        self.norm = self.kernel.LSGPattern(BLOCK, BLOCK, 2, "norm", num_global_tokens=1)
        self.local = self.kernel.LSGPattern(BLOCK, 0, 1, "none", num_global_tokens=1)

    def train(self, attend):
        """A forward and a backward."""
        leaves = [x.requires_grad_() for x in self.inputs]
        torch.autograd.grad(attend(*leaves), leaves, self.dout)

    def benchmark_local_forward(self):
        """No sparse part: blocks see themselves, the one before and the one after, and the global token."""
        self.out = self.kernel.lsg_attention(*self.inputs, self.local)

    def verify_local_forward(self):
        """The same by PyTorch, with a mask."""
        block = (torch.arange(self.inputs[0].shape[2], device=self.device) - 1).div(BLOCK, rounding_mode="floor")
        mask = (block[:, None] - block).abs() <= 1
        mask[0] = mask[:, 0] = True
        return scaled_dot_product_attention(*self.inputs, attn_mask=mask)

    def benchmark_norm_forward(self):
        """With a sparse part of one block on each side, of which the half with the largest norms is kept."""
        self.out = self.kernel.lsg_attention(*self.inputs, self.norm)

    def benchmark_norm_training(self):
        """The same with its backward."""
        self.train(lambda *x: self.kernel.lsg_attention(*x, self.norm))

    def benchmark_full_forward(self):
        """Every token sees every other, by PyTorch."""
        self.out = scaled_dot_product_attention(*self.inputs)

    def benchmark_full_training(self):
        """The same with its backward."""
        self.train(scaled_dot_product_attention)
