# SPDX-License-Identifier: Apache-2.0
"""Plan and launch the forward products of an expert layer that have nothing on top.

T num_tokens, K top_k, R = T * K routed rows in expert order, E num_experts, H hidden_size,
I intermediate_size.
"""

from __future__ import annotations

import torch

from moe_ops._triton.activation import RoutedRows
from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.schedule import Rows, TileSchedule
from moe_ops.quantization.stored import StoredWeight


def plan_down(
    routed: RoutedRows,
    h: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    bias: torch.Tensor | None,
) -> GroupedGemm | DecodingGemm:
    """Plan h @ weight[e].T + bias[e] before h is computed."""
    rows = Rows(routed.rows.token_counts, routed.rows.num_rows)
    return plan_projection(h, weight, rows, 0, bias, routed.kernel_config, can_describe_y=True)


def plan_projection(
    x: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    rows: Rows,
    x_divisor: int,
    bias: torch.Tensor | None,
    kernel_config: str | None,
    *,
    can_describe_y: bool | None = None,
) -> GroupedGemm | DecodingGemm:
    """Plan a forward product: it decodes a quantised weight, or reads it in full size."""
    if not isinstance(weight, torch.Tensor):
        decoding = DecodingGemm.where_planned(
            x, weight, rows, kernel_config, x_divisor=x_divisor, bias=bias
        )
        if decoding is not None:
            return decoding
    return GroupedGemm(
        "forward", x, weight, rows,
        x_divisor=x_divisor, bias=bias, can_describe_y=can_describe_y, kernel_config=kernel_config,
    )  # fmt: skip


def store_down(
    down: GroupedGemm | DecodingGemm, schedule: TileSchedule | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product, and numbers that sum to its rows that belong to an expert."""
    used_rows = down.rows.token_counts
    if isinstance(down, DecodingGemm):
        y = down.x.new_empty(down.rows.num_rows, down.weight.shape[1])
        down.launch(y)
        return y, used_rows
    y = down.new_operand()
    down.launch(y, zeros_tail=False, shared=schedule)
    return y, used_rows if down.schedule is None else down.schedule.used_rows
