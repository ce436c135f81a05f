# SPDX-License-Identifier: Apache-2.0
"""What the launches of the warp-specialised kernels for Hopper share: the kernels, and descriptors.

These kernels load and store through descriptors only. The plan has made sure that TMA can describe
every operand.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from moe_ops._triton.descriptors import describe_for_gluon


@functools.cache
def why_no_kernels() -> str | None:
    """Return why this Triton cannot compile the kernels, or None if it can."""
    # Gluon is experimental: a later Triton may have moved what the kernels use.
    try:
        kernels()
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon lacks something that warp-specialised kernels use: {error}"
    return None


@functools.cache
def kernels() -> SimpleNamespace:
    """Import the kernels' modules, and with them Gluon, when they are first needed."""
    from moe_ops._triton.kernels import (
        hopper_cooperative,
        hopper_experts,
        hopper_pingpong,
        hopper_tall,
    )

    return SimpleNamespace(
        cooperative=hopper_cooperative,
        tall=hopper_tall,
        pingpong=hopper_pingpong,
        experts=hopper_experts,
    )


def describe_b(b: torch.Tensor, block_n: int, block_k: int, halves: bool = False) -> Any:
    """Return a descriptor of b (E, K, N) in its stored order: (E, N, K) where K is dense.

    With `halves`, a block takes half of its columns from each half of b's. This is for b stored as
    (E, N, K) only.
    """
    if b.stride(1) != 1:
        return describe_for_gluon(b, (1, block_k, block_n))
    stored = b.transpose(1, 2)
    if halves:
        stored = stored.unflatten(1, (2, b.shape[2] // 2))
        return describe_for_gluon(stored, (1, 2, block_n // 2, block_k))
    return describe_for_gluon(stored, (1, block_n, block_k))


def describe_parts(rows: torch.Tensor, width: int, block_rows: int, columns: int) -> Any:
    """Return a ragged descriptor of rows in parts of `width` columns: gate and up, or one part."""
    parts = rows.unflatten(1, (-1, width))
    return describe_for_gluon(parts, (block_rows, 1, columns), ragged=True)
