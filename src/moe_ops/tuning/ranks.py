# SPDX-License-Identifier: Apache-2.0
"""Shares the work of tuning among the ranks of torch.distributed."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import distributed


@dataclass(frozen=True)
class Ranks:
    """The ranks that tune for the same GPU, and this rank's place among them."""

    index: int = 0
    count: int = 1
    peers: tuple[int, ...] = (0,)
    group: Any = None

    def exchange(self, mine: Any) -> list[tuple[int, Any]]:
        """Return (rank, what it gave) of each peer, when all ranks have come here."""
        if self.group is None:
            return [(0, mine)]
        given = _gathered(mine, self.group)
        return [(rank, given[rank]) for rank in self.peers]


@contextlib.contextmanager
def ranks_of(device_name: str) -> Iterator[Ranks]:
    """Yield the ranks with this GPU. All ranks meet here; without torch.distributed there is one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        yield Ranks()
        return
    # gloo goes through the host. NCCL's watchdog would take a long wait for a hang.
    group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    try:
        names = _gathered(device_name, group)
        peers = tuple(rank for rank, name in enumerate(names) if name == device_name)
        yield Ranks(peers.index(distributed.get_rank()), len(peers), peers, group)
    finally:
        distributed.destroy_process_group(group)


def _gathered(mine: Any, group: Any) -> list[Any]:
    """Return what every rank gave, by rank."""
    given: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(given, mine, group=group)
    return given
