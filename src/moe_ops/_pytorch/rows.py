# SPDX-License-Identifier: Apache-2.0
"""Moving rows between token order and expert order: what several pytorch.py share.

T num_tokens, K top_k, R = T * K routed rows; slot = token * K + k.

Indices are clamped into range before each use: corrupt ones give unspecified values, never an
access out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def slots_of_rows(gather_indices: Tensor) -> Tensor:
    """Return the slot of each row in expert order, (R,)."""
    return gather_indices.clamp(0, max(gather_indices.shape[0] - 1, 0))


def tokens_of_rows(gather_indices: Tensor, top_k: int) -> Tensor:
    """Return the token of each row in expert order, (R,)."""
    slots = slots_of_rows(gather_indices)
    return slots if top_k == 1 else slots.div(top_k, rounding_mode="floor")


def rows_of_slots(gather_indices: Tensor, scatter_indices: Tensor | None) -> Tensor:
    """Return the row in expert order of each slot, (R,): scatter_indices, or the inverse found here."""
    if scatter_indices is not None:
        return scatter_indices.clamp(0, max(scatter_indices.shape[0] - 1, 0))
    rows = torch.arange(gather_indices.shape[0], device=gather_indices.device)
    return torch.zeros_like(rows).scatter_(0, slots_of_rows(gather_indices).long(), rows)


def weights_of_rows(topk_weights: Tensor, gather_indices: Tensor | None) -> Tensor:
    """Return the weight of each row in expert order, (R, 1), in fp32 (fp64 for fp64)."""
    weights = topk_weights.reshape(-1, 1)
    if gather_indices is not None:
        weights = weights.index_select(0, slots_of_rows(gather_indices))
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def sum_slots(
    rows: Tensor, rows_of_slots: Tensor, topk_weights: Tensor | None, top_k: int
) -> Tensor:
    """Return sum_k topk_weights[t, k] * rows[rows_of_slots[t * K + k]] of each token t.

    Multiplied and summed in fp32 (fp64 for fp64).
    """
    num_tokens = rows_of_slots.shape[0] // top_k
    if num_tokens == 0 or rows.shape[1] == 0:
        return rows.new_empty(num_tokens, rows.shape[1])
    if top_k == 1 and topk_weights is None:
        return rows.index_select(0, rows_of_slots)
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    slots = rows_of_slots.reshape(num_tokens, top_k)
    weights = None if topk_weights is None else topk_weights.to(accumulator)
    if rows.dtype == accumulator:
        # It gathers, multiplies and sums without storing the gathered rows. For bf16 and fp16 it
        # would round the weights, and the sum not to the nearest.
        return F.embedding_bag(slots, rows.contiguous(), mode="sum", per_sample_weights=weights)
    output = rows.new_empty(num_tokens, rows.shape[1])
    for part in chunks(num_tokens, top_k * rows.shape[1]):
        gathered = rows.index_select(0, slots[part].flatten()).to(accumulator)
        gathered = gathered.unflatten(0, (-1, top_k))
        if weights is None:
            output[part] = gathered.sum(1)
        else:
            output[part] = torch.bmm(weights[part, None], gathered).squeeze(1)
    return output


def chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Yield the rows of a matrix of `width`, in parts that stay in the cache while they are used."""
    step = max(CHUNK // max(width, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


# Elements of such a part.
CHUNK = 2**19
