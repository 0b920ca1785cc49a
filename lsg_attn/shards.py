"""Which heads a process has where tensor parallelism shares them out."""

from __future__ import annotations

from typing import Any

from torch import nn


def first_head_of(projection: nn.Module, num_heads: int) -> int | None:
    """The number of the first head that a projection to ``num_heads`` heads makes in this process.

    It is None where the weight is no DTensor cut by its rows: all heads are made here.

    Raises:
        ValueError: the processes do not get whole heads, as many each.
    """
    weight: Any = getattr(projection, "weight", None)
    cut = [i for i, placement in enumerate(getattr(weight, "placements", ())) if placement.is_shard(0)]
    if not cut:
        return None
    mesh = weight.device_mesh
    ranks = [mesh.size(i) for i in cut]
    if len(cut) > 1 or num_heads % ranks[0]:
        raise ValueError(
            f"expected the projections to be cut along one dimension of the mesh, of a size that divides the "
            f"{num_heads} heads; got sizes {ranks}"
        )
    heads: int = num_heads // ranks[0]
    return heads * int(mesh.get_local_rank(cut[0]))
