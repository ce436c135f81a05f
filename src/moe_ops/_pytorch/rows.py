# SPDX-License-Identifier: Apache-2.0
"""Rows of experts, and moving them to and from token order: what several pytorch.py share.

T num_tokens, K top_k, R = T * K routed rows; slot = token * K + k.

Indices are clamped into range before each use: corrupt ones give unspecified values, never an
access out of bounds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


def tokens_of_rows(gather_indices: torch.Tensor, top_k: int) -> torch.Tensor:
    """The token of each row in expert order, (R,)."""
    num_rows = gather_indices.shape[0]
    slots = gather_indices.clamp(0, max(num_rows - 1, 0))
    return slots if top_k == 1 else slots.div(top_k, rounding_mode="floor")


def rows_of_slots(
    gather_indices: torch.Tensor, scatter_indices: torch.Tensor | None
) -> torch.Tensor:
    """The row in expert order of each slot, (R,): scatter_indices, or the inverse found here."""
    num_rows = gather_indices.shape[0]
    last = max(num_rows - 1, 0)
    if scatter_indices is not None:
        return scatter_indices.clamp(0, last)
    rows = torch.arange(num_rows, device=gather_indices.device)
    return torch.zeros_like(rows).scatter_(0, gather_indices.clamp(0, last).long(), rows)


class Routing:
    """What belongs to a row in expert order: its slot, its token, its weight."""

    def __init__(
        self,
        gather_indices: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        top_k: int,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        if gather_indices is not None:
            self.slots = gather_indices.clamp(0, max(num_rows - 1, 0)).long()
            self.tokens = tokens_of_rows(gather_indices, top_k)
        if topk_weights is not None:
            weights = topk_weights.reshape(-1, 1)
            if gather_indices is not None:
                weights = weights.index_select(0, self.slots)
            self.scale = weights.to(dtype)


@dataclass(frozen=True, eq=False, slots=True)
class ExpertEnds:
    """The end row of each expert, E, of num_rows rows.

    Attributes:
        listed: as numbers.
        tensor: int32 on the CPU, not to be written to.
        tail: the rows from here on belong to no expert.
    """

    num_rows: int
    listed: tuple[int, ...]
    tensor: torch.Tensor
    tail: int


def expert_ends(token_counts: torch.Tensor, num_rows: int) -> ExpertEnds:
    """Where each expert's rows end.

    Corrupt counts are clamped: they give unspecified values, never an access out of bounds.
    """
    return _ends_of(tuple(token_counts.tolist()), num_rows)


# The same counts come to both projections, forward and backward: a model's layers have room here.
@functools.lru_cache(maxsize=256)
def _ends_of(counts: tuple[int, ...], num_rows: int) -> ExpertEnds:
    ends = list(itertools.accumulate(counts))
    if ends and (min(counts) < 0 or ends[-1] > num_rows):
        clamped = itertools.accumulate(min(max(count, 0), num_rows) for count in counts)
        ends = [min(end, num_rows) for end in clamped]
    tensor = torch.tensor(ends, dtype=torch.int32, device="cpu")
    return ExpertEnds(num_rows, tuple(ends), tensor, ends[-1] if ends else 0)


def sum_slots(
    rows: torch.Tensor, rows_of_slots: torch.Tensor, topk_weights: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """sum_k topk_weights[t, k] * rows[rows_of_slots[t * K + k]], summed in fp32 (fp64 for fp64)."""
    num_tokens = rows_of_slots.shape[0] // top_k
    if num_tokens == 0 or rows.shape[1] == 0:
        return rows.new_empty(num_tokens, rows.shape[1])
    if top_k == 1 and topk_weights is None:
        return rows.index_select(0, rows_of_slots)
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    slots = rows_of_slots.reshape(num_tokens, top_k)
    weights = None if topk_weights is None else topk_weights.to(accumulator)
    if rows.dtype == accumulator:
        # Gathers, multiplies and sums without storing the gathered rows. For bf16 and fp16 it
        # rounds the weights, and the sum not to the nearest.
        return torch.nn.functional.embedding_bag(
            slots, rows.contiguous(), mode="sum", per_sample_weights=weights
        )
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
    """The rows of a matrix of `width`, in parts that stay in the cache while they are worked on."""
    step = max(CHUNK // max(width, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


# Elements of such a part.
CHUNK = 2**19
