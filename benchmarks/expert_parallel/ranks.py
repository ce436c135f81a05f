# SPDX-License-Identifier: Apache-2.0
"""Timing on several ranks: they start a call together, and the slowest one's time counts."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from benchmarks.cuda.timing import Bench

# So many times L2 is overwritten before a call, half a millisecond: the host gets ahead of the GPU.
_FLUSHES = 8
# Ranks that compile for the first time may be so far apart.
_TIMEOUT = timedelta(minutes=5)


@dataclass
class RanksBench(Bench):
    """Where this rank measures. Every rank makes the same calls in the same order.

    Attributes:
        rank, world_size: of the default process group.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def set_out(self) -> None:
        """Meets the other ranks: on a GPU its stream does, and the host runs ahead."""
        if self.device.type != "cuda":
            distributed.barrier()
            return
        for _ in range(_FLUSHES):
            super().set_out()
        distributed.all_reduce(torch.empty(1, device=self.device))

    def counted(self, times: list[float]) -> list[float]:
        """The times of the slowest rank, call by call."""
        return self.largest(times)

    def largest(self, values: list[float]) -> list[float]:
        """The largest of all ranks' values, place by place; a NaN counts as infinite."""
        told = [math.inf if math.isnan(value) else value for value in values]
        found = torch.tensor(told, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.tolist()


def group_name() -> str:
    """The name of the default group, as ops take it."""
    assert distributed.group.WORLD is not None
    return distributed.group.WORLD.group_name


def start(work: Callable[..., None], world_size: int, device: str, *given: Any) -> None:
    """Calls work(bench, *given) on the ranks of a new group, each in a process of its own.

    Args:
        work: a function of a module.
        world_size: number of ranks.
        device: "cuda", rank r takes GPU r; or "cpu".
        given: what `work` takes beside its Bench.

    Raises:
        torch.multiprocessing.ProcessExitedException: a rank failed, which has printed why. The
            others are ended.
    """
    store = str(Path(tempfile.mkdtemp()) / "store")
    given = (work, world_size, device, store, given)
    spawn(_run, given, nprocs=world_size)


def _run(
    rank: int,
    work: Callable[..., None],
    world_size: int,
    device: str,
    store: str,
    given: tuple[Any, ...],
) -> None:
    status = 1
    try:
        bench = RanksBench(torch.device(device), rank=rank, world_size=world_size)
        if device == "cuda":
            bench.device = torch.device("cuda", rank)
            torch.cuda.set_device(bench.device)
        else:
            torch.set_num_threads(1)
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
            device_id=bench.device if device == "cuda" else None,
        )
        work(bench, *given)
        distributed.barrier()
        status = 0
    except Exception:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    sys.stdout.flush()
    # A Python that ends while a thread of gloo frees a tensor aborts (pytorch#190489).
    os._exit(status)


def all_ranks_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    distributed.all_reduce(tensor)
    return tensor
