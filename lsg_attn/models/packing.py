"""Padding-free batches: documents one after the other, as transformers' DataCollatorWithFlattening makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import integer, type_name


class Packed(NamedTuple):
    """Where the rows of n packed documents are, each with its G global tokens in front. It goes where masks go.

    Attributes:
        cu_seqlens: (n + 1,) int64, where each document's rows start, globals first, and the last one's stop.
        max_seqlen: the most rows that a document has.
        first_tokens: (n,) int64, the first token of each document among the tokens.
        positions: (total,) int64, the position of each token in its document.
        token_rows, global_rows: (total,) and (n, G) int64, the rows of the tokens and of the globals.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    first_tokens: Tensor
    positions: Tensor
    token_rows: Tensor
    global_rows: Tensor

    def with_globals(self, tokens: Tensor, globals_: Tensor) -> Tensor:
        """Rows (1, n G + total, width) of tokens (1, total, width) and the globals (G, width) of each document."""
        count = self.global_rows.numel()
        rows = tokens.new_empty(1, count + tokens.shape[1], tokens.shape[2])
        repeated = globals_.repeat(len(self.global_rows), 1).unsqueeze(0)
        return rows.index_copy(1, self.token_rows, tokens).index_copy(1, self.global_rows.flatten(), repeated)


def pack(
    lengths: tuple[Tensor | None, Tensor | None, int | None, int | None], embeds: Tensor, num_globals: int
) -> Packed | None:
    """The Packed of a model's arguments for embeddings (1, total, width), or None if there are none.

    ``lengths``: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, as transformers passes them.

    Raises:
        TypeError: cu_seq_lens_q is not a tensor, or max_length_q not an integer.
        ValueError: they do not fit each other or the embeddings, or a part is missing.
    """
    cu_seq_lens, cu_seq_lens_k, max_length, max_length_k = lengths
    if all(x is None for x in lengths):
        return None
    if cu_seq_lens is None or max_length is None:
        raise ValueError("cu_seq_lens_q, max_length_q: expected both for packed documents, got one of them alone")
    if not isinstance(cu_seq_lens, Tensor):
        raise TypeError(f"cu_seq_lens_q: expected a torch.Tensor, got {type_name(cu_seq_lens)}")
    if cu_seq_lens.dim() != 1 or len(cu_seq_lens) < 2:
        raise ValueError(f"cu_seq_lens_q: expected shape (n + 1,), got {tuple(cu_seq_lens.shape)}")
    if len(embeds) != 1:
        raise ValueError(f"cu_seq_lens_q: expected documents packed into a batch of 1, got one of {len(embeds)}")
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens and not torch.equal(cu_seq_lens_k, cu_seq_lens):
        raise ValueError("cu_seq_lens_k: expected cu_seq_lens_q, as a document attends to itself")
    if max_length_k not in (None, max_length):
        raise ValueError(f"max_length_k: expected max_length_q = {max_length}, got {max_length_k}")
    max_length = integer("max_length_q", max_length, 1)
    if cu_seq_lens.is_cpu and not torch.compiler.is_compiling():
        ends, longest = (int(cu_seq_lens[0]), int(cu_seq_lens[-1])), int(cu_seq_lens.diff().max())
        if ends != (0, embeds.shape[1]) or int(cu_seq_lens.diff().min()) < 1 or longest > max_length:
            raise ValueError(
                f"cu_seq_lens_q: expected increasing values from 0 to {embeds.shape[1]} that are at most max_length_q="
                f"{max_length} apart, got {cu_seq_lens.tolist()}"
            )
    device, starts = embeds.device, cu_seq_lens.to(embeds.device, torch.int64)
    numbers, rows = torch.arange(len(starts), device=device), torch.arange(embeds.shape[1], device=device)
    document = torch.repeat_interleave(numbers[:-1], starts.diff(), output_size=embeds.shape[1])  # waits for no device
    cu_seqlens = starts + num_globals * numbers
    return Packed(
        cu_seqlens=cu_seqlens,
        max_seqlen=max_length + num_globals,
        first_tokens=starts[:-1],
        positions=rows - starts[document],
        token_rows=rows + num_globals * (document + 1),
        global_rows=cu_seqlens[:-1, None] + torch.arange(num_globals, device=device),
    )
