# SPDX-License-Identifier: Apache-2.0
"""Exchange rows through symmetric memory: kernels write into the pools of the other ranks.

Each process group has one pool on each rank, which all layers share. A pool has two halves, used by
turns: exchange n uses half n % 2. An exchange has these steps on every rank, in stream order:

    begin   n += 1, in the pool's own memory on the device; tell the peers this exchange's size
    push    write rows into half n % 2 of the peers' pools
    meet    a barrier: what all ranks pushed is there
    read    copy or sum what lies in half n % 2 of the own pool

What a rank would send to itself does not go through its pool.

One barrier for each exchange is enough. A rank that pushes exchange n + 2 writes into the half of
exchange n, so its peers must have read that. It pushes behind its barrier of n + 1. That ends when all
peers have come to it, and a peer comes to it behind its own read of n.

n is not an argument of the kernels, because a CUDA graph may hold an odd number of exchanges: its
replays would begin at the wrong half. All ranks make the same exchanges, so they agree on n.

Ranks must exchange the same sizes, or they would read each other's rows at wrong places. Nobody can
see that when a call begins. So the begin of exchange n + 1 compares what all ranks said of n, and
stops the device with an error if they differ. Of a layer's exchanges one follows each dispatch, so
its result does not leave the layer.

Nothing that an op returns or saves lies in a pool. The barrier has the time limit of the group's
collectives. Then it traps, which ends the process's use of the GPU with an error: NCCL's watchdog
does not see it. Multicast is not used.

A pool grows if a call needs more, on all ranks at once, and never while a CUDA graph is captured.
Graphs that were captured before keep the memory that they know. Whoever replays a graph on another
stream than the last exchange lets that stream wait for it, as for any graph that shares memory.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from moe_ops._core.torch_private import group_timeout, process_group, symmetric_memory
from moe_ops._core.transport import ENVIRONMENT_VARIABLE, OfGroups, check_world_size, plan_of
from moe_ops._triton.expert_parallel import Window, begin_exchange, sizes_bytes
from moe_ops._triton.launch import cdiv
from moe_ops._triton.recorder import recorder

# A pool grows in steps of this many bytes, the pages of GPU memory.
_PAGE = 2 << 20


class Exchanges(Protocol):
    """What ops exchange rows through: a Pool, or a stand-in where there is no GPU."""

    def begin(self, num_bytes: int, capacity: int) -> Window:
        """Begin an exchange that needs so many bytes of a half, for so many rows of each rank."""

    def meet(self) -> None:
        """Wait for all ranks; then what they pushed is there."""


class _Memory:
    """Memory of a pool: this rank's, and how it and the kernels find that of the others.

    Args:
        half_bytes: the size of a half, the same on all ranks; the ranks' sizes lie at its end.
        group: the name of the process group.
        device: where it lies.

    Attributes:
        is_captured: whether a CUDA graph holds its addresses.
    """

    def __init__(self, half_bytes: int, group: str, device: torch.device) -> None:
        symmetric = symmetric_memory()
        self._buffer = symmetric.empty(2 * half_bytes, dtype=torch.uint8, device=device)
        sizes = half_bytes - sizes_bytes(process_group(group).size())
        self._buffer.view(2, half_bytes)[:, sizes:].zero_()
        # With deterministic algorithms torch fills new memory, too. No peer may push before that.
        torch.cuda.synchronize(device)
        self.handle: Any = symmetric.rendezvous(self._buffer, group)
        rank = self.handle.rank
        # torch's addresses are those of allocations, in which the buffers may begin later.
        begin = self._buffer.data_ptr() - self.handle.buffer_ptrs[rank]
        begins: list[Any] = [None] * self.handle.world_size
        torch.distributed.all_gather_object(begins, begin, group=process_group(group))
        peers = [p + b for p, b in zip(self.handle.buffer_ptrs, begins, strict=True)]
        self.window = Window(
            torch.tensor(peers, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            half_bytes,
            sizes,
            rank,
        )
        self.is_captured = False


class Pool:
    """The symmetric memory of a process group on this rank.

    Args:
        group: the name of the process group. The pool must not keep the group itself.
        device: a GPU, the same for all calls.
    """

    def __init__(self, group: str, device: torch.device) -> None:
        self._group, self._device = group, device
        self._memory: _Memory | None = None
        self._captured: list[_Memory] = []
        self._stream: torch.cuda.Stream | None = None
        self._timeout_ms = round(group_timeout(process_group(group), device).total_seconds() * 1e3)

    def begin(self, num_bytes: int, capacity: int) -> Window:
        """Begin an exchange that needs so many bytes of a half, the same number on all ranks.

        Args:
            num_bytes: of a half.
            capacity: how many rows a rank sends to each.

        Raises:
            RuntimeError: the pool would have to grow while a CUDA graph is captured, or torch gives
                no symmetric memory.
            ValueError: the ranks ask for different numbers.
        """
        if (watching := recorder()) is not None and watching.obstacle is None:
            watching.obstacle = "it exchanges rows with other ranks"
        memory = self._memory
        if memory is None or memory.window.sizes < num_bytes:
            # torch gathers objects on the current device.
            with torch.cuda.device(self._device):
                memory = self._grown(num_bytes)
        self._follow(memory)
        begin_exchange(memory.window, num_bytes, capacity)
        return memory.window

    def meet(self) -> None:
        """Wait on the device until all ranks are here; trap after the group's time limit."""
        assert self._memory is not None
        with torch.cuda.device(self._device):
            self._memory.handle.barrier(channel=0, timeout_ms=self._timeout_ms)

    def _grown(self, num_bytes: int) -> _Memory:
        """Return larger memory. It waits for the device, and is a collective."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"moe_ops: a CUDA graph cannot capture the growth of a process group's symmetric "
                f"memory, to 2 x {num_bytes} bytes; run the largest call once before the capture"
            )
        # What is under way still uses the old memory, here and on the peers.
        torch.cuda.synchronize(self._device)
        group = process_group(self._group)
        asked: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(asked, num_bytes, group=group)
        if len(set(asked)) > 1:
            raise ValueError(
                f"moe_ops: expected calls of the same sizes on all ranks, got {asked} bytes to "
                f"exchange; pass equal capacity, hidden_size, top_k and dtypes on every rank"
            )
        if self._memory is not None and self._memory.is_captured:
            self._captured.append(self._memory)
        self._memory = None
        half_bytes = cdiv(num_bytes + sizes_bytes(group.size()), _PAGE) * _PAGE
        try:
            self._memory = _Memory(half_bytes, self._group, self._device)
        except RuntimeError as error:
            raise RuntimeError(
                f"moe_ops: torch gives no symmetric memory of 2 x {half_bytes} bytes to the process "
                f"group: {error}; set {ENVIRONMENT_VARIABLE}=functional on all ranks to do without"
            ) from error
        return self._memory

    def _follow(self, memory: _Memory) -> None:
        """Let this stream wait for the one of the last exchange."""
        if torch.cuda.is_current_stream_capturing():
            # A capture begins when the device has done all else, and cannot wait for other streams.
            memory.is_captured = True
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


_pools: OfGroups[Pool] = OfGroups()


def pool_for(op: str, world_size: int, group: str, device: torch.device) -> Pool | None:
    """Return the pool of the group of this name, or None if it has another transport.

    Raises:
        ValueError: the group has another number of ranks.
        RuntimeError: the symmetric transport is asked for and cannot be had.
    """
    if world_size == 1:
        return None
    check_world_size(op, world_size, group)
    if plan_of(world_size, group, device, can_push=True).transport != "symmetric":
        return None
    return _pools.get(group, lambda _: Pool(group, device))
