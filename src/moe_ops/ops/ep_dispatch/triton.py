# SPDX-License-Identifier: Apache-2.0
"""Run ep_dispatch and its backward in Triton.

T num_tokens, K top_k, W world_size, C capacity, S slots of a token on one rank, W * C rows of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._core.transport import exchange
from moe_ops._triton.expert_parallel import (
    Layout,
    Sizes,
    place_slots,
    receive_rows,
    send_rows,
    sum_over_ranks,
    take_values,
)
from moe_ops._triton.launch import cdiv
from moe_ops._triton.symmetric import Exchanges, pool_for

# Where ids and weights begin among the bytes for a rank.
_ALIGNMENT = 16


def ep_dispatch(
    input: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "ep_dispatch"
    sizes = Sizes(num_experts, world_size, capacity, topk_ids.shape[1])
    if (pool := pool_for(op, world_size, group, input.device)) is not None:
        return push_dispatch(pool, input, topk_ids, topk_weights, sizes)
    rows, local_ids, local_weights = _new_outputs(input, topk_weights, sizes)
    local = (local_ids, local_weights)
    if world_size == 1:
        sent_slots, senders, num_dropped = place_slots(topk_ids, topk_weights, sizes, local)
        send_rows(input, world_size, capacity, to=rows, senders=senders)
        return rows, *local, sent_slots, num_dropped
    packed = _new_packed(*local, world_size)
    to = _unpacked(packed, *local)
    sent_slots, senders, num_dropped = place_slots(topk_ids, topk_weights, sizes, to)
    send_rows(input, world_size, capacity, to=rows, senders=senders)
    output = exchange(op, rows, world_size, group)
    came = exchange(op, packed, world_size, group)
    for each, part in zip(local, _unpacked(came, *local), strict=True):
        each.view(part.shape).copy_(part)
    return output, *local, sent_slots, num_dropped


def push_dispatch(
    pool: Exchanges, input: Tensor, topk_ids: Tensor, topk_weights: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do ep_dispatch through the ranks' pools."""
    rows, local_ids, local_weights = _new_outputs(input, topk_weights, sizes)
    layout = Layout.of(rows.nbytes, local_ids.nbytes, local_weights.nbytes)
    window = pool.begin(layout.end, sizes.capacity)
    local = (local_ids, local_weights)
    sent_slots, senders, num_dropped = place_slots(
        topk_ids, topk_weights, sizes, local, window, layout
    )
    send_rows(input, sizes.world_size, sizes.capacity, to=rows, senders=senders, window=window)
    pool.meet()
    receive_rows(rows, sizes, window, layout, local)
    return rows, local_ids, local_weights, sent_slots, num_dropped


def _new_outputs(
    input: Tensor, topk_weights: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what comes: rows, ids and weights."""
    shape = (sizes.num_rows, sizes.columns)
    return (
        input.new_empty(sizes.num_rows, input.shape[1]),
        torch.empty(shape, dtype=torch.int32, device=input.device),
        topk_weights.new_empty(shape),
    )


def _new_packed(local_ids: Tensor, local_weights: Tensor, world_size: int) -> Tensor:
    """Return bytes (W, n) in which ids and weights for each rank have room side by side."""
    num_bytes = sum(
        cdiv(t.numel() // world_size * t.itemsize, _ALIGNMENT) * _ALIGNMENT
        for t in (local_ids, local_weights)
    )
    # A view of no bytes would have no valid strides.
    num_bytes = max(num_bytes, _ALIGNMENT)
    return torch.empty(world_size, num_bytes, dtype=torch.uint8, device=local_ids.device)


def _unpacked(packed: Tensor, local_ids: Tensor, local_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and the weights (W, C * S) that packed holds, as views."""
    num_ids = local_ids.numel() // packed.shape[0] * local_ids.itemsize
    num_weights = local_weights.numel() // packed.shape[0] * local_weights.itemsize
    begin = cdiv(num_ids, _ALIGNMENT) * _ALIGNMENT
    return (
        packed[:, :num_ids].view(local_ids.dtype),
        packed[:, begin : begin + num_weights].view(local_weights.dtype),
    )


def ep_dispatch_backward(
    grad_output: Tensor,
    grad_local_weights: Tensor,
    local_ids: Tensor,
    sent_slots: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    op = "ep_dispatch_backward"
    sizes = Sizes(num_experts, world_size, capacity, sent_slots.shape[1])
    if (pool := pool_for(op, world_size, group, grad_output.device)) is not None:
        return push_dispatch_backward(
            pool, grad_output, grad_local_weights, local_ids, sent_slots, sizes, needs
        )
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if needs[0]:
        rows = exchange(op, grad_output.contiguous(), world_size, group)
        grad_input = sum_over_ranks(rows, sent_slots, sizes)
    if needs[1]:
        values = exchange(op, grad_local_weights.contiguous(), world_size, group)
        grad_topk_weights = take_values(values, sent_slots, sizes)
    return grad_input, grad_topk_weights


def push_dispatch_backward(
    pool: Exchanges,
    grad_output: Tensor,
    grad_local_weights: Tensor,
    local_ids: Tensor,
    sent_slots: Tensor,
    sizes: Sizes,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Do ep_dispatch_backward through the ranks' pools, both gradients in one exchange."""
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    in_turn = (sizes.world_size, sizes.capacity)
    sent = [grad_output if needs[0] else None, None, grad_local_weights if needs[1] else None]
    layout = Layout.of(*(0 if t is None else t.numel() * t.itemsize for t in sent))
    window = pool.begin(layout.end, sizes.capacity)
    grad_output, grad_local_weights = grad_output.contiguous(), grad_local_weights.contiguous()
    if needs[0]:
        send_rows(grad_output, *in_turn, ids=local_ids, window=window)
    if needs[1]:
        # What goes to a rank is one long row.
        width = sizes.num_places // sizes.world_size
        flat = grad_local_weights.view(sizes.world_size, width)
        send_rows(flat, sizes.world_size, 1, window=window, offset=layout.weights)
    pool.meet()
    if needs[0]:
        grad_input = sum_over_ranks(grad_output, sent_slots, sizes, window)
    if needs[1]:
        grad_topk_weights = take_values(
            grad_local_weights, sent_slots, sizes, window, layout.weights
        )
    return grad_input, grad_topk_weights
