# SPDX-License-Identifier: Apache-2.0
"""ep_combine and its backward in PyTorch."""

from __future__ import annotations

from torch import Tensor

from moe_ops._core.transport import exchange
from moe_ops._pytorch.expert_parallel import num_columns, rows_to_send, sum_over_ranks, within


def ep_combine(
    input: Tensor,
    local_ids: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    columns = num_columns(sent_slots.shape[1], num_experts, world_size)
    places = within(sent_slots, world_size * capacity * columns)
    rows = exchange("ep_combine", input.contiguous(), world_size, group)
    return sum_over_ranks(rows, places, columns, world_size)


def ep_combine_backward(
    grad_output: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    columns = num_columns(sent_slots.shape[1], num_experts, world_size)
    num_rows = world_size * capacity
    places = within(sent_slots, num_rows * columns)
    rows = rows_to_send(grad_output, places, columns, num_rows)
    return exchange("ep_combine_backward", rows, world_size, group)
