# SPDX-License-Identifier: Apache-2.0
"""ep_dispatch and its backward in PyTorch.

T num_tokens, K top_k, W world_size, S slots of a token on one rank, W * C rows of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._core.transport import exchange
from moe_ops._pytorch.expert_parallel import (
    invert,
    num_columns,
    places_of_slots,
    rows_to_send,
    sum_over_ranks,
    within,
)


def ep_dispatch(
    input: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = num_columns(topk_ids.shape[1], num_experts, world_size)
    num_rows = world_size * capacity
    sent_slots, num_dropped = places_of_slots(topk_ids, num_experts, world_size, capacity)
    places = within(sent_slots, num_rows * columns)
    rows = rows_to_send(input, places, columns, num_rows)
    slots = invert(places.flatten(), num_rows * columns)
    ids = _values_at(topk_ids % (num_experts // world_size), slots, -1).int()
    weights = _values_at(topk_weights, slots, 0)
    output = exchange("ep_dispatch", rows, world_size, group)
    # Ids and weights go together, as bytes.
    local = [t.reshape(num_rows, columns) for t in (ids, weights)]
    sent = [t.view(torch.uint8) for t in local]
    received = exchange("ep_dispatch", torch.cat(sent, 1), world_size, group)
    for each, part in zip(sent, received.split([t.shape[1] for t in sent], 1), strict=True):
        each.copy_(part)
    local_ids, local_weights = local
    return output, local_ids, local_weights, sent_slots, num_dropped


def _values_at(values: Tensor, slots: Tensor, empty: int) -> Tensor:
    """Return values.flatten()[slots], and `empty` where the slot is -1."""
    if values.numel() == 0:
        return values.new_full(slots.shape, empty)
    found = values.reshape(-1).index_select(0, slots.clamp(min=0))
    return found.masked_fill_(slots < 0, empty)


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
    columns = num_columns(sent_slots.shape[1], num_experts, world_size)
    num_places = world_size * capacity * columns
    places = within(sent_slots, num_places)
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if needs[0]:
        rows = exchange(op, grad_output.contiguous(), world_size, group)
        grad_input = sum_over_ranks(rows, places, columns, world_size)
    if needs[1]:
        sent = exchange(op, grad_local_weights.contiguous(), world_size, group)
        grad_topk_weights = _values_at(sent, places.flatten(), 0).reshape(places.shape)
    return grad_input, grad_topk_weights
