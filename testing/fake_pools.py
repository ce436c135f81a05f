# SPDX-License-Identifier: Apache-2.0
"""Pools of several ranks in the memory of one process, for interpreted kernels that push rows.

The ranks are threads of which one runs at a time. Each runs until it meets the others; when all have
come, they go on in another order. So a rank may read what came, and push into the others' pools for
the next exchange, before or after any other does. That is what the real barrier allows.
"""

import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops._triton.expert_parallel import Window, begin_exchange, sizes_bytes

# What the pools hold where nobody wrote.
UNWRITTEN = 0xA5


class FakePool:
    """The pool of one rank, with the methods of symmetric.Pool."""

    def __init__(self, ranks: "FakeRanks", rank: int, window: Window) -> None:
        self._ranks, self._rank, self.window = ranks, rank, window
        self.num_exchanges = 0
        self.largest = 0

    def begin(self, num_bytes: int, capacity: int) -> Window:
        assert num_bytes <= self._ranks.half_bytes
        self.largest = max(self.largest, num_bytes)
        self.num_exchanges += 1
        begin_exchange(self.window, num_bytes, capacity)
        return self.window

    def meet(self) -> None:
        self._ranks.wait(self._rank)


class FakeRanks:
    """W ranks and their pools.

    Args:
        world_size: W.
        half_bytes: the size of a half.
        num_halves: 2. With 1 both halves are the same, which is wrong.
        empty: makes the memory, by default torch.empty.
    """

    def __init__(
        self,
        world_size: int,
        half_bytes: int,
        num_halves: int = 2,
        empty: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.half_bytes = half_bytes
        whole = half_bytes + sizes_bytes(world_size)
        self.memory = [empty((2 * whole,), dtype=torch.uint8) for _ in range(world_size)]
        for memory in self.memory:
            memory.fill_(UNWRITTEN).view(2, whole)[:, half_bytes:].zero_()
        peers = torch.tensor([memory.data_ptr() for memory in self.memory])
        apart = whole if num_halves == 2 else 0
        self.pools = [
            FakePool(
                self,
                rank,
                Window(peers, torch.zeros(1, dtype=torch.int32), apart, half_bytes, rank),
            )
            for rank in range(world_size)
        ]

    def run(self, work: Callable[[int, FakePool], Any], seed: int = 0) -> list[Any]:
        """Return work(rank, pool) of each rank. They go on in an order that the seed draws."""
        order = random.Random(seed)
        world_size = len(self.pools)
        self._may_run = [threading.Semaphore(0) for _ in range(world_size)]
        self._has_stopped = threading.Semaphore(0)
        results: list[Any] = [None] * world_size
        errors: list[BaseException] = []
        alive = set(range(world_size))

        def one(rank: int) -> None:
            self._may_run[rank].acquire()
            try:
                results[rank] = work(rank, self.pools[rank])
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                errors.append(error)
            alive.discard(rank)
            self._has_stopped.release()

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(world_size)]
        for thread in threads:
            thread.start()
        while alive and not errors:
            for rank in order.sample(sorted(alive), len(alive)):
                self._may_run[rank].release()
                self._has_stopped.acquire()
        if errors:
            raise errors[0]
        return results

    def wait(self, rank: int) -> None:
        """Stop this rank until all others have come here."""
        self._has_stopped.release()
        self._may_run[rank].acquire()

    def check_unwritten(self) -> None:
        """Check that nobody wrote behind what the exchanges needed."""
        for memory, pool in zip(self.memory, self.pools, strict=True):
            for half in memory.view(2, -1):
                assert (half[pool.largest : self.half_bytes] == UNWRITTEN).all()
