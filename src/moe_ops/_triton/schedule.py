# SPDX-License-Identifier: Apache-2.0
"""Describe the routed rows of a call, and make their tile schedules on the device.

E num_experts, R routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ops._triton.kernels.schedule import expert_offsets_kernel, tile_schedule_kernel
from moe_ops._triton.launch import cdiv, launch, next_power_of_2
from moe_ops._triton.plan import BLOCK_W
from moe_ops.configs.device import device_of


@dataclass(slots=True)
class Rows:
    """Describe R routed rows in expert order: the rows of each expert, and each row's slot.

    Attributes:
        token_counts ((E,), index): how many rows each expert has; rows past their sum have none.
        num_rows: R.
        gather ((R,), index): the slot of each row; None: row i is slot i.
        top_k: how many slots a token has.
    """

    token_counts: torch.Tensor
    num_rows: int
    gather: torch.Tensor | None = None
    top_k: int = 1

    @classmethod
    def of(
        cls,
        token_counts: torch.Tensor,
        num_rows: int,
        gather: torch.Tensor | None = None,
        top_k: int = 1,
    ) -> Rows:
        """Make Rows with contiguous indices, as the kernels need them."""
        gather = None if gather is None else gather.contiguous()
        return cls(token_counts.contiguous(), num_rows, gather, top_k)

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.token_counts.shape[0]

    @property
    def is_empty(self) -> bool:
        """Return whether no expert can have a row."""
        return self.num_rows == 0 or self.num_experts == 0

    def max_tiles(self, block_m: int) -> int:
        """Return an upper bound of the row tiles: each expert may add a partly empty one."""
        return cdiv(self.num_rows, block_m) + self.num_experts


class TileSchedule:
    """Hold the tiles of block_m rows that kernels/schedule.py makes of token_counts.

    With `experts`, the first one and the end, it holds their tiles alone, and counts them from 0.
    """

    def __init__(self, rows: Rows, block_m: int, experts: tuple[int, int] | None = None) -> None:
        self.rows = rows
        self.block_m = block_m
        self.experts = experts or (0, rows.num_experts)
        self.max_tiles = rows.max_tiles(block_m)
        device = rows.token_counts.device
        self.tiles = torch.empty(3 * self.max_tiles + 2, dtype=torch.int32, device=device)

    @property
    def used_rows(self) -> torch.Tensor:
        """Return how many rows belong to an expert, (1,)."""
        return self.tiles[-1:]

    def launch(
        self, zeroed: torch.Tensor | None = None, scatter: torch.Tensor | None = None
    ) -> None:
        """Make the schedule, and zero the rows of `zeroed` that belong to no expert.

        Those are the last rows of the expert order. With `scatter`, row i is stored at scatter[i].
        """
        rows = self.rows
        num_sms = device_of(rows.token_counts.device).num_sms
        launch(
            # At least one program for each SM: all of them share the rows to zero.
            tile_schedule_kernel, (max(rows.num_experts, num_sms),),
            rows.token_counts, self.tiles, zeroed, scatter,
            rows.num_rows, rows.num_experts, *self.experts, self.max_tiles,
            0 if zeroed is None else zeroed.shape[1],
            BLOCK_M=self.block_m, EXPERTS=next_power_of_2(rows.num_experts), BLOCK_W=BLOCK_W,
            ZERO_TAIL=zeroed is not None, SCATTER=scatter is not None,
            on=rows.token_counts,
        )  # fmt: skip


def expert_offsets(token_counts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the first row and the end row of each expert, int32 (2, E)."""
    num_experts = token_counts.shape[0]
    offsets = torch.empty(2, num_experts, dtype=torch.int32, device=token_counts.device)
    if num_experts > 0:
        launch(
            expert_offsets_kernel, (1,),
            token_counts.contiguous(), offsets, num_rows, num_experts,
            EXPERTS=next_power_of_2(num_experts),
            on=token_counts,
        )  # fmt: skip
    return offsets
