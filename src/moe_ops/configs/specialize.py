# SPDX-License-Identifier: Apache-2.0
"""Say which products the warp-specialised kernels for Hopper compute, and why not the others.

The tile decides which kernel it is. With PINGPONG_TILE it is ping-pong: each of two groups of warps
has tiles of its own, and one finishes a tile while the other multiplies. With a wider tile it is
cooperative: both groups share the tile. TALL_TILE is a cooperative tile whose rows come in parts of
64. Cooperative kernels compute bare products only.
"""

from __future__ import annotations

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.kernel_config import PINGPONG_TILE
from moe_ops.configs.problem import Problem

COOPERATIVE, TALL, PINGPONG = "cooperative", "tall", "pingpong"

_MEANINGS = {
    "gather": "rows that are gathered",
    "scatter": "rows that are scattered",
    "scale": "router weights",
    "bias": "a bias",
    "dots": "the router gradient",
    "transposed": "a transposed weight",
}


def why_not_specialized(problem: Problem, tile: tuple[int, int]) -> str | None:
    """Return why no warp-specialised kernel computes the product in such tiles, or None.

    Args:
        problem: the product.
        tile: rows and columns, the first two of KernelConfig.tile.
    """
    is_pingpong = tile == PINGPONG_TILE
    if problem.has_activation:
        # "gather" is not in this list: the rows are copied into expert order first.
        lacks = ["scatter", "scale", "dots", "transposed"]
        if not is_pingpong:
            return "warp-specialised kernels compute an activation on top only in tiles of 128x128"
        if problem.epilogue == "activation":
            return "warp-specialised kernels compute no activation without a gate"
    elif is_pingpong:
        lacks = ["gather", "dots"]
    else:
        lacks = ["gather", "scatter", "scale", "bias", "dots"]
    found = [_MEANINGS[name] for name in lacks if getattr(problem, name)]
    if not found:
        return None
    kernels = f"warp-specialised kernels with tiles of {tile[0]}x{tile[1]}"
    return f"{kernels} do not take {', '.join(found)}"


def asks_for_backward(device: Device, itemsize: int) -> bool:
    """Return whether a dX may be asked to compute the activation's backward on top.

    A kernel for Hopper does that, for 16 bits. Elsewhere a second kernel does, and the product is a
    bare one.
    """
    return device.capability[0] == HOPPER and itemsize == 2
