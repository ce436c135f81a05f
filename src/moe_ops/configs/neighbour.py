# SPDX-License-Identifier: Apache-2.0
"""Take the configuration of the nearest problem that was measured.

A good tile changes slowly with the sizes of a product. It changes at once with what the kernel
computes beside the product, and with the range of rows per expert: few rows ask for low tiles. So a
neighbour has the same pass, flags, size of elements and range of rows. The distance is taken between
logarithms, since sizes matter by their ratios:

    distance^2 = log2(N / N')^2 + log2(D / D')^2
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from moe_ops.configs.device import Device
from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.problem import Problem, is_vector, problem_of

# The distance of problems of which one size differs by a factor of 4. Those say nothing any more.
MAX_DISTANCE = 2.0


def is_enabled() -> bool:
    """Return whether neighbours are taken; MOE_OPS_NEIGHBOURS=0 says no, and rules compute."""
    return os.environ.get("MOE_OPS_NEIGHBOURS") != "0"


def nearest(problem: Problem, table: Mapping[str, KernelConfig], device: Device) -> str | None:
    """Return the key of the nearest neighbour in a table, or None without one.

    Of equally near ones, the one whose number of experts is nearest wins.

    Args:
        problem: the product.
        table: configurations by Problem.key.
        device: the GPU, whose shared memory the neighbour's configuration must fit.
    """
    found: list[tuple[float, float, str]] = []
    for key in table:
        other = problem_of(key)
        if not _is_like(problem, other):
            continue
        far = distance(problem, other)
        if far < MAX_DISTANCE:
            experts = abs(_log_ratio(problem.num_experts, other.num_experts))
            found.append((far, experts, key))
    for _, _, key in sorted(found):
        if shared_memory(table[key], problem, device) <= device.shared_memory:
            return key
    return None


def distance(problem: Problem, other: Problem) -> float:
    """Return how far two problems of the same kind are from each other."""
    return math.hypot(
        _log_ratio(problem.out_features, other.out_features),
        _log_ratio(problem.in_features, other.in_features),
    )


def _log_ratio(size: int, other: int) -> float:
    return math.log2(max(size, 1) / max(other, 1))


def _is_like(problem: Problem, other: Problem) -> bool:
    """Return whether the same kernel computes both, for as many rows per expert."""
    return _traits(problem) == _traits(other)


def _traits(problem: Problem) -> tuple[object, ...]:
    vectors = is_vector(problem.out_features), is_vector(problem.in_features)
    return problem.kind, problem.flags, problem.rows, problem.dtype == "float32", vectors
