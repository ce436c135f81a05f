# SPDX-License-Identifier: Apache-2.0
"""Computes dispatch and combine of expert parallelism for all ranks at once, one slot at a time.

T tokens of a rank, K top_k, H hidden size, W ranks with L = E / W experts each, C capacity,
S = min(K, L) columns. The lists have one element for each rank. Rows that no token fills are NaN.

The functions under the ops' names are for a world of one, which the others are held against.
"""

from typing import Any

import torch
from torch import Tensor

from testing.oracle.differentiate import to_fp64

NAN = float("nan")


def sent_slots(topk_ids: Tensor, num_experts: int, world_size: int, capacity: int) -> Tensor:
    """Return (T, K): the place of each slot in what its rank sends, -1 where it is not sent."""
    num_local = num_experts // world_size
    columns = min(topk_ids.shape[1], num_local)
    num_sent = [0] * world_size
    places = torch.full(topk_ids.shape, -1, dtype=torch.int32)
    for token, ids in enumerate(topk_ids.tolist()):
        for rank in range(world_size):
            slots = [
                k for k, i in enumerate(ids) if 0 <= i < num_experts and i // num_local == rank
            ]
            if not slots or num_sent[rank] == capacity:
                continue
            row = rank * capacity + num_sent[rank]
            for column, slot in enumerate(slots[:columns]):
                places[token, slot] = row * columns + column
            num_sent[rank] += 1
    return places


def local_ids(topk_ids: Tensor, num_experts: int, world_size: int, capacity: int) -> Tensor:
    """Return local_ids of ep_dispatch in a world of one."""
    assert world_size == 1
    columns = min(topk_ids.shape[1], num_experts)
    local = torch.full((capacity * columns,), -1, dtype=torch.int32)
    places = sent_slots(topk_ids, num_experts, world_size, capacity)
    for place, expert in zip(places.flatten().tolist(), topk_ids.flatten().tolist(), strict=True):
        if place >= 0:
            local[place] = expert
    return local.reshape(capacity, columns)


def dispatch(
    inputs: list[Tensor],
    ids: list[Tensor],
    weights: list[Tensor],
    num_experts: int,
    capacity: int,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return what ep_dispatch returns on each rank."""
    world_size = len(inputs)
    num_local = num_experts // world_size
    top_k, width = ids[0].shape[1], inputs[0].shape[1]
    columns = min(top_k, num_local)
    places = [sent_slots(each, num_experts, world_size, capacity) for each in ids]
    results = []
    for me in range(world_size):
        rows = [torch.full((width,), NAN, dtype=torch.float64)] * (world_size * capacity)
        local_ids = torch.full((world_size * capacity, columns), -1, dtype=torch.int32)
        zero = torch.zeros((), dtype=torch.float64)
        local_weights = [[zero] * columns for _ in rows]
        for source in range(world_size):
            x, w = to_fp64(inputs[source], weights[source])
            for token, slot_places in enumerate(places[source].tolist()):
                for slot, place in enumerate(slot_places):
                    row, column = divmod(place, columns)
                    if place < 0 or row // capacity != me:
                        continue
                    row = source * capacity + row % capacity
                    rows[row] = x[token]
                    local_ids[row, column] = int(ids[source][token, slot]) % num_local
                    local_weights[row][column] = w[token, slot]
        asked = (ids[me] >= 0) & (ids[me] < num_experts)
        num_dropped = (asked & (places[me] < 0)).sum().reshape(1).int()
        output = _stack(rows, (0, width))
        each_weight = [torch.stack(row) for row in local_weights]
        results.append((
            output, local_ids, _stack(each_weight, (0, columns)), places[me], num_dropped,
        ))  # fmt: skip
    return results


def combine(
    outputs: list[Tensor], places: list[Tensor], num_experts: int, capacity: int
) -> list[Tensor]:
    """Return what ep_combine returns on each rank."""
    world_size, width = len(outputs), outputs[0].shape[1]
    columns = min(places[0].shape[1], num_experts // world_size)
    outputs = [to_fp64(output) for output in outputs]
    results = []
    for me in range(world_size):
        sums = []
        for token in places[me].tolist():
            rows = sorted({place // columns for place in token if place >= 0})
            total = torch.zeros(width, dtype=torch.float64)
            for row in rows:
                total = total + outputs[row // capacity][me * capacity + row % capacity]
            sums.append(total)
        results.append(_stack(sums, (0, width)))
    return results


def ep_dispatch(
    input: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int, world_size: int,
    capacity: int, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert world_size == 1
    return dispatch([input], [topk_ids], [topk_weights], num_experts, capacity)[0]


def ep_combine(
    input: Tensor, local_ids: Tensor, sent_slots: Tensor, num_experts: int, world_size: int,
    capacity: int, group: str,
) -> Tensor:  # fmt: skip
    assert world_size == 1
    return combine([input], [sent_slots], num_experts, capacity)[0]


def ep_dispatch_backward(
    grad_output: Tensor, grad_local_weights: Tensor, local_ids: Tensor, sent_slots: Tensor,
    num_experts: int, world_size: int, capacity: int, group: str, needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    sizes = (num_experts, world_size, capacity, group)
    grad_input = ep_combine(grad_output, local_ids, sent_slots, *sizes)
    sent = to_fp64(grad_local_weights).flatten().tolist()
    grad_weights = torch.tensor(
        [[sent[place] if place >= 0 else 0.0 for place in token] for token in sent_slots.tolist()],
        dtype=torch.float64,
    ).reshape(sent_slots.shape)
    return grad_input if needs[0] else None, grad_weights if needs[1] else None


def ep_combine_backward(
    grad_output: Tensor, sent_slots: Tensor, num_experts: int, world_size: int, capacity: int,
    group: str,
) -> Tensor:  # fmt: skip
    assert world_size == 1
    columns = min(sent_slots.shape[1], num_experts)
    grads = to_fp64(grad_output)
    rows = torch.full((capacity, grads.shape[1]), NAN, dtype=torch.float64)
    for token, slots in enumerate(sent_slots.tolist()):
        for place in slots:
            if place >= 0:
                rows[place // columns] = grads[token]
    return rows


def filled_rows(sent_slots: Tensor, num_experts: int, world_size: int, capacity: int) -> Tensor:
    """Return which of the rows (W * C,) that a rank sends hold a token."""
    columns = min(sent_slots.shape[1], num_experts // world_size)
    filled = torch.zeros(world_size * capacity, dtype=torch.bool)
    for place in sent_slots.flatten().tolist():
        if place >= 0:
            filled[place // columns] = True
    return filled


def unspecified(op: str, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return for each output of the oracle which rows are unspecified, or None."""
    has_gaps = {"ep_dispatch": 1, "ep_combine_backward": 1}.get(op, 0)
    return tuple(each.isnan() if index < has_gaps else None for index, each in enumerate(outputs))


def _stack(rows: list[Tensor], empty: tuple[int, int]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(empty, dtype=torch.float64)
