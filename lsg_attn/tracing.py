"""What is being traced: the one question that versions of torch answer differently."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing, without Dynamo: torch 2.11 calls all that Dynamo traces an export."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
