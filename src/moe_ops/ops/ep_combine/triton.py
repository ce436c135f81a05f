# SPDX-License-Identifier: Apache-2.0
"""Run ep_combine and its backward in Triton."""

from __future__ import annotations

from torch import Tensor

from moe_ops._core.transport import exchange
from moe_ops._triton.expert_parallel import Sizes, invert_places, send_rows, sum_over_ranks


def ep_combine(
    input: Tensor,
    local_ids: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    sizes = Sizes(num_experts, world_size, capacity, sent_slots.shape[1])
    rows = exchange("ep_combine", input.contiguous(), world_size, group)
    return sum_over_ranks(rows, sent_slots, sizes)


def ep_combine_backward(
    grad_output: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    sizes = Sizes(num_experts, world_size, capacity, sent_slots.shape[1])
    rows = grad_output.new_empty(sizes.num_rows, grad_output.shape[1])
    senders = invert_places(sent_slots, sizes)
    send_rows(grad_output, world_size, capacity, to=rows, senders=senders)
    return exchange("ep_combine_backward", rows, world_size, group)
