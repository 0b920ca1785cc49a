"""The tile helpers at offsets that a test's tensors cannot reach."""

import torch
import triton
import triton.language as tl
from running import DEVICE

from lsg_attn.kernels.primitives import row_ptrs, rows_at


@triton.jit
def _offsets(x_ptr, out_ptr, strides, batch, head, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: the element offsets that a tile of rows of one head would be read at."""
    rows, offs_d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    base = rows_at(x_ptr, strides, tl.zeros((), tl.int32) + batch, tl.zeros((), tl.int32) + head, True)
    bytes_from_x = row_ptrs(base, first_row, rows, offs_d).to(tl.int64) - x_ptr.to(tl.int64)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + offs_d[None, :], bytes_from_x // 4)


def test_offsets_beyond_two_to_the_31():
    """Of a batch, a head, a row and a column, one at a time."""
    x = torch.zeros(1, device=DEVICE)
    for strides in (
        ((1 << 31) - 8, 64, 16, 1),
        (64, (1 << 31) - 8, 16, 1),
        (64, 64, 1 << 26, 1),
        (64, 64, 16, 1 << 28),
    ):
        out = torch.empty(16, 16, dtype=torch.int64, device=DEVICE)
        _offsets[(1,)](x, out, strides, 3, 5, 100, ROWS=16, COLUMNS=16)
        rows, columns = torch.arange(100, 116).unsqueeze(-1), torch.arange(16)
        expected = 3 * strides[0] + 5 * strides[1] + rows * strides[2] + columns * strides[3]
        assert expected.max() >= 1 << 31
        assert torch.equal(out.cpu(), expected)
