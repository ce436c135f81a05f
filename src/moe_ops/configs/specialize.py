# SPDX-License-Identifier: Apache-2.0
"""Which products the kernels for Hopper compute, whose warps are of two kinds."""

from __future__ import annotations

from moe_ops.configs.kernel_config import TURNS_TILE
from moe_ops.configs.problem import Problem


def specializes(problem: Problem, tile: tuple[int, int]) -> bool:
    """Whether kernels/hopper*.py have a kernel for that, on Hopper.

    tile: rows and columns, as of KernelConfig.tile.
    """
    flags = set(problem.flags)
    if problem.has_activation:
        # Rows that are to be gathered are copied before it.
        return flags - {"gather", "bias"} == {"gated"} and tile == TURNS_TILE
    # What is gated in dX is done by two kernels where the tile is another.
    flags -= {"transposed", "gated"}
    return flags <= {"scatter", "scale", "bias"} if tile == TURNS_TILE else not flags
