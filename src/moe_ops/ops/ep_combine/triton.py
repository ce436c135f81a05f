# SPDX-License-Identifier: Apache-2.0
"""Run ep_combine and its backward in Triton."""

from __future__ import annotations

from torch import Tensor

from moe_ops._core.transport import exchange
from moe_ops._triton.expert_parallel import (
    Layout,
    Sizes,
    invert_places,
    receive_rows,
    send_rows,
    sum_over_ranks,
)
from moe_ops._triton.symmetric import Exchanges, pool_for


def ep_combine(
    input: Tensor,
    local_ids: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    op = "ep_combine"
    sizes = Sizes(num_experts, world_size, capacity, sent_slots.shape[1])
    if (pool := pool_for(op, world_size, group, input.device)) is not None:
        return push_combine(pool, input, local_ids, sent_slots, sizes)
    rows = exchange(op, input.contiguous(), world_size, group)
    return sum_over_ranks(rows, sent_slots, sizes)


def push_combine(
    pool: Exchanges, input: Tensor, local_ids: Tensor, sent_slots: Tensor, sizes: Sizes
) -> Tensor:
    """Do ep_combine through the ranks' pools."""
    input = input.contiguous()
    window = pool.begin(Layout.of(input.nbytes, 0, 0).end, sizes.capacity)
    send_rows(input, sizes.world_size, sizes.capacity, ids=local_ids, window=window)
    pool.meet()
    return sum_over_ranks(input, sent_slots, sizes, window)


def ep_combine_backward(
    grad_output: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> Tensor:
    op = "ep_combine_backward"
    sizes = Sizes(num_experts, world_size, capacity, sent_slots.shape[1])
    if (pool := pool_for(op, world_size, group, grad_output.device)) is not None:
        return push_combine_backward(pool, grad_output, sent_slots, sizes)
    rows = grad_output.new_empty(sizes.num_rows, grad_output.shape[1])
    senders = invert_places(sent_slots, sizes)
    send_rows(grad_output, world_size, capacity, to=rows, senders=senders)
    return exchange(op, rows, world_size, group)


def push_combine_backward(
    pool: Exchanges, grad_output: Tensor, sent_slots: Tensor, sizes: Sizes
) -> Tensor:
    """Do ep_combine_backward through the ranks' pools. Flags tell which rows came."""
    rows = grad_output.new_empty(sizes.num_rows, grad_output.shape[1])
    layout = Layout.of(rows.nbytes, 4 * sizes.num_rows, 0)
    window = pool.begin(layout.end, sizes.capacity)
    senders = invert_places(sent_slots, sizes)
    send_rows(
        grad_output, sizes.world_size, sizes.capacity,
        to=rows, senders=senders, window=window, flags=layout.ids,
    )  # fmt: skip
    pool.meet()
    receive_rows(rows, sizes, window, layout)
    return rows
