# SPDX-License-Identifier: Apache-2.0
"""Launch what an adapter of low rank adds to the products of a frozen weight.

M rows in expert order, E experts; a weight is (E, N, D), its adapter's factors are (E, L, D) and
(E, N, L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.kernels.adapter import add_low_rank_kernel
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, precision
from moe_ops._triton.schedule import Rows, TileSchedule
from moe_ops.configs.device import device_of


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter: lora_b[e] @ lora_a[e] is added to the weight of expert e.

    Attributes:
        lora_a ((E, L, D)): the first factor, in any strides.
        lora_b ((E, N, L)): the second factor, in any strides.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    @property
    def is_empty(self) -> bool:
        """Return whether its rank is 0: it adds nothing."""
        return self.lora_a.shape[1] == 0

    def reduce(self, x: torch.Tensor, rows: Rows, x_divisor: int = 0) -> torch.Tensor:
        """Return x @ lora_a[e].T (M, L), zero in rows of no expert.

        GroupedGemm explains x_divisor.
        """
        return self._thin("forward", x, self.lora_a, rows, x_divisor)

    def reduce_gradient(self, g: torch.Tensor, rows: Rows, x_divisor: int = 0) -> torch.Tensor:
        """Return g @ lora_b[e] (M, L), zero in rows of no expert."""
        return self._thin("backward_dX", g, self.lora_b, rows, x_divisor)

    def _thin(
        self, kind: str, x: torch.Tensor, factor: torch.Tensor, rows: Rows, x_divisor: int
    ) -> torch.Tensor:
        if self.is_empty:
            return x.new_empty(rows.num_rows, 0)
        gemm = GroupedGemm(kind, x, factor, rows, x_divisor=x_divisor)
        low = x.new_empty(rows.num_rows, gemm.n)
        gemm.launch(low)
        return low

    def add(
        self, low: torch.Tensor, y: torch.Tensor, rows: Rows, schedule: TileSchedule | None
    ) -> None:
        """Add low @ lora_b[e].T to y, the product with the weight. A schedule of the rows may serve."""
        if not self.is_empty:
            _add(low, self.lora_b.transpose(1, 2), y, rows, schedule)

    def add_gradient(
        self, low: torch.Tensor, y: torch.Tensor, rows: Rows, schedule: TileSchedule | None
    ) -> None:
        """Add low @ lora_a[e] to y, the gradient's product with the weight."""
        if not self.is_empty:
            _add(low, self.lora_a, y, rows, schedule)


def _add(
    low: torch.Tensor,
    factor: torch.Tensor,
    y: torch.Tensor,
    rows: Rows,
    schedule: TileSchedule | None,
) -> None:
    """Add low @ factor[e] to y (M, N). Without a schedule the kernel finds its tiles."""
    _, rank, width = factor.shape
    if rows.is_empty or y.numel() == 0:
        return
    block_m = 32 if schedule is None else schedule.block_m
    block_n = min(64, max(16, next_power_of_2(width)))
    device = device_of(y.device)
    # More ranks at a time do not fit into registers.
    most_ranks = 16 if (0, 0) < device.capability < (8, 0) else 128 // y.itemsize
    tiles, max_tiles = (None, 0) if schedule is None else (schedule.tiles, schedule.max_tiles)
    programs = device.num_sms * 4
    launch(
        add_low_rank_kernel, (min(programs, rows.max_tiles(block_m) * cdiv(width, block_n)),),
        low, factor, y, rows.token_counts, tiles, max_tiles, rows.num_rows,
        rows.num_experts, width, rank, *factor.stride(), y.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_L=min(most_ranks, max(16, next_power_of_2(rank))),
        GROUP_M=8, PRECISION=precision(y.dtype),
        EXPERTS=next_power_of_2(rows.num_experts) if schedule is None else 1,
        FINDS_TILES=schedule is None, num_warps=8 if block_m > 64 else 4,
        on=y,
    )  # fmt: skip
