# SPDX-License-Identifier: Apache-2.0
"""Carry rows between the ranks of a process group: which transport does it, and why.

There is one transport so far, functional collectives, which every backend of torch.distributed has.
A transport within one NVLink host, whose kernels push rows into the peers' memory, is to be one
more branch of `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How rows go from rank to rank, and why so.

    Attributes:
        transport: "none" or "functional".
        reason: why it was chosen.
    """

    transport: str
    reason: str


def plan(world_size: int) -> Plan:
    """Choose the transport for a group of so many ranks."""
    if world_size == 1:
        return Plan("none", "a world of one keeps its rows")
    return Plan("functional", "functional collectives run on every backend")


def exchange(op: str, rows: Tensor, world_size: int, group: str) -> Tensor:
    """Send the r-th of world_size equal parts of rows to rank r; return what came, by rank.

    Args:
        op: what errors name.
        rows (world_size * n, ...): contiguous. It is returned as it is where nobody else is.
        world_size: number of ranks.
        group: name of their process group.

    Raises:
        ValueError: the group has another number of ranks.
        RuntimeError: from torch, if there is no such group, or a rank does not answer.
    """
    if plan(world_size).transport == "none":
        return rows
    # torch's own functional collectives find a group's size by its name in this way.
    from torch.distributed.distributed_c10d import _get_group_size_by_name

    # Newer torch has a type of its own for names.
    if (size := _get_group_size_by_name(cast(Any, group))) != world_size:
        raise ValueError(
            f"moe::{op}: expected world_size == number of ranks of group {group!r} ({size}), "
            f"got {world_size}"
        )
    functional = torch.ops._c10d_functional
    parts = [rows.shape[0] // world_size] * world_size
    return functional.wait_tensor(functional.all_to_all_single(rows, parts, parts, group))
