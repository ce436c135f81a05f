# SPDX-License-Identifier: Apache-2.0
"""Carry rows between the ranks of a process group: which transport does it, and why.

    none        a world of one keeps its rows
    functional  torch's functional all-to-all with equal parts, which every backend has
    symmetric   Triton kernels push rows into the peers' memory (_triton/symmetric.py)

`plan` chooses. All ranks must choose the same: it looks only at what every rank knows of all ranks,
and at the environment, which must be the same everywhere.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_ops._core.torch_private import all_to_all, has_symmetric_memory, process_group

logger = logging.getLogger("moe_ops")

ENVIRONMENT_VARIABLE = "MOE_OPS_EP_TRANSPORT"
WISHES = ("functional", "symmetric")

T = TypeVar("T")


class Plan(NamedTuple):
    """How rows go from rank to rank, and why so.

    Attributes:
        transport: "none", "functional" or "symmetric".
        reason: why it was chosen.
    """

    transport: str
    reason: str


@dataclass(frozen=True)
class Rank:
    """What a rank tells the others of where it runs.

    Attributes:
        host: the name of its host.
        device_type: "cuda" or "cpu".
        gpu: the UUID of its GPU.
        sees: the UUIDs of the GPUs that its process sees.
        reaches: those of them whose memory its own can access, itself left out.
        has_symmetric_memory: whether its torch has symmetric memory.
    """

    host: str
    device_type: str
    gpu: str = ""
    sees: tuple[str, ...] = ()
    reaches: tuple[str, ...] = ()
    has_symmetric_memory: bool = True


def plan(
    world_size: int,
    ranks: Callable[[], tuple[Rank, ...]],
    can_push: bool,
) -> Plan:
    """Choose the transport for a group: the symmetric one, which is faster, where it can be had.

    Args:
        world_size: number of ranks.
        ranks: called if the choice depends on where the ranks run. It may be a collective.
        can_push: whether the implementation that asks has kernels that push rows.

    Raises:
        RuntimeError: MOE_OPS_EP_TRANSPORT names no transport, or one that cannot be had here.
    """
    if world_size == 1:
        return Plan("none", "a world of one keeps its rows")
    wish = os.environ.get(ENVIRONMENT_VARIABLE)
    if wish and wish not in WISHES:
        raise RuntimeError(
            f"moe_ops: expected {ENVIRONMENT_VARIABLE} to be {' or '.join(WISHES)}, got {wish}"
        )
    if wish == "functional":
        return Plan("functional", f"asked for by {ENVIRONMENT_VARIABLE}")
    obstacle = "only Triton kernels on CUDA GPUs push rows"
    if can_push:
        obstacle = why_not_symmetric(ranks())
    if wish and obstacle:
        raise RuntimeError(f"moe_ops: {ENVIRONMENT_VARIABLE}=symmetric: {obstacle}; use functional")
    if obstacle:
        return Plan("functional", obstacle)
    reason = f"asked for by {ENVIRONMENT_VARIABLE}" if wish else "all GPUs access each other"
    return Plan("symmetric", reason)


def why_not_symmetric(ranks: tuple[Rank, ...]) -> str:
    """Return why the ranks cannot push rows into each other's memory, or "" if they can."""
    for index, rank in enumerate(ranks):
        if rank.device_type != "cuda":
            return f"the tensors of rank {index} are on {rank.device_type}, not on a CUDA GPU"
        if not rank.has_symmetric_memory:
            return f"the torch of rank {index} has no symmetric memory"
        if rank.host != ranks[0].host:
            return f"rank {index} is on {rank.host} and rank 0 on {ranks[0].host}"
        for other, peer in enumerate(ranks[:index]):
            if rank.gpu == peer.gpu:
                return f"ranks {other} and {index} share a GPU"
            for one, two in ((index, other), (other, index)):
                if ranks[two].gpu not in ranks[one].sees:
                    return (
                        f"rank {one} does not see the GPU of rank {two}: let each process see all "
                        "GPUs of its host (CUDA_VISIBLE_DEVICES)"
                    )
            if peer.gpu not in rank.reaches or rank.gpu not in peer.reaches:
                return f"the GPUs of ranks {other} and {index} do not access each other's memory"
    return ""


class OfGroups(Generic[T]):
    """Values of process groups, by their names; a value goes with its group.

    A group that is destroyed and made again under its old name has no value yet.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[weakref.ref[Any], T]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str, make: Callable[[Any], T]) -> T:
        """Return the value of the group of this name; make(group) makes one that is not there."""
        group = process_group(name)
        kept = self._values.get(name)
        if kept is not None and kept[0]() is group:
            return kept[1]
        value = make(group)
        self._values[name] = (weakref.ref(group, lambda gone: self._drop(name, gone)), value)
        return value

    def _drop(self, name: str, gone: weakref.ref[Any]) -> None:
        # The name may be another group's by now.
        if name in self._values and self._values[name][0] is gone:
            del self._values[name]


# By the type of the device: a group may serve two. Plans also by what was asked for, and of whom.
_ranks: OfGroups[dict[str, tuple[Rank, ...]]] = OfGroups()
_plans: OfGroups[dict[tuple[str, bool, str | None], Plan]] = OfGroups()


def plan_of(world_size: int, group: str, device: torch.device, can_push: bool) -> Plan:
    """Return the plan of the process group of this name, for tensors on this device.

    A new plan is logged.
    """
    known = _plans.get(group, lambda _: {})
    key = (device.type, can_push, os.environ.get(ENVIRONMENT_VARIABLE))
    if key not in known:
        known[key] = plan(world_size, lambda: ranks_of(group, device), can_push)
        logger.info(
            "moe_ops: process group %s exchanges rows on %s by the %s transport: %s",
            group, device.type, *known[key],
        )  # fmt: skip
    return known[key]


def ranks_of(group: str, device: torch.device) -> tuple[Rank, ...]:
    """Return where all ranks of the process group of this name run. The first call is a collective."""
    known = _ranks.get(group, lambda _: {})
    if device.type not in known:
        known[device.type] = _gather(process_group(group), device)
    return known[device.type]


def _gather(group: Any, device: torch.device) -> tuple[Rank, ...]:
    """Return what all ranks tell of themselves. It waits for the host, once for each group."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "moe_ops: the first exchange of a process group gathers facts, which a CUDA graph cannot "
            "capture; run it once before the capture"
        )
    found: list[Any] = [None] * group.size()
    # torch gathers objects on the current device; -1 leaves that as it is.
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        torch.distributed.all_gather_object(found, _this_rank(device), group=group)
    return tuple(found)


def _this_rank(device: torch.device) -> Rank:
    host = socket.gethostname()
    if device.type != "cuda":
        return Rank(host, device.type)
    own, seen = device.index, range(torch.cuda.device_count())
    reaches = tuple(
        _uuid(other)
        for other in seen
        if other != own and torch.cuda.can_device_access_peer(own, other)
    )
    sees = tuple(map(_uuid, seen))
    return Rank(host, "cuda", _uuid(own), sees, reaches, has_symmetric_memory())


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def check_world_size(op: str, world_size: int, group: str) -> None:
    """Raise ValueError if the process group of this name has another number of ranks."""
    if (size := process_group(group).size()) != world_size:
        raise ValueError(
            f"moe::{op}: expected world_size == number of ranks of group {group!r} ({size}), "
            f"got {world_size}"
        )


def exchange(op: str, rows: Tensor, world_size: int, group: str) -> Tensor:
    """Send the r-th of world_size equal parts of rows to rank r; return what came, by rank.

    This is the functional transport, and what implementations use that have no other.

    Args:
        op: what errors name.
        rows (world_size * n, ...): contiguous. It is returned as it is where nobody else is.
        world_size: number of ranks.
        group: name of their process group.

    Raises:
        ValueError: the group has another number of ranks.
        RuntimeError: another transport is asked for; or from torch, if there is no such group, or a
            rank does not answer.
    """
    if plan(world_size, tuple, can_push=False).transport == "none":
        return rows
    check_world_size(op, world_size, group)
    return all_to_all(rows, world_size, group)
