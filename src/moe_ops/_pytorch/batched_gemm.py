# SPDX-License-Identifier: Apache-2.0
"""The products of many small experts as one torch.bmm.

functional.grouped_mm multiplies one expert after the other, each with all threads: where experts are
small, what stands around a product is most of the time. A bmm gives whole experts to threads, but
wants as many rows of each. So the first `size` rows of each expert are copied into a batch, which an
expert of fewer fills with its neighbours' (with zeros where rows are summed); what a larger expert
has beyond them is a product of its own.

R rows in expert order, E experts, D and N the sizes of each matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from moe_ops._pytorch.rows import ExpertEnds

# In multiplications, measured on Zen 4 in bf16: what stands around the product of one expert, and
# what copying an element costs, twice that where the rows that are not the expert's are then zeroed.
# Around MKL's products in fp32 stands too little to pay for the copies.
_AROUND_PRODUCT = 5 * 2**20
_COPY = 10
# In products: the steps around the batch, and those around the rest of an expert beyond it.
_AROUND_BATCH, _AROUND_BEYOND = 3, 2
# Rows of a batch for each row there is, at most: it bounds the memory of the copies.
_MOST_ROWS = 2
# The part of all multiplications that must be won.
_WON = 1 / 32


def may_batch(
    num_experts: int,
    num_rows: int,
    matrix_shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    sums_rows: bool,
) -> bool:
    """Whether there are counts for which a batch costs less than products one by one."""
    return _most_won(num_experts, num_rows, matrix_shape, dtype, sums_rows) > 0


def batch_size(
    ends: ExpertEnds, matrix_shape: tuple[int, int], dtype: torch.dtype, *, sums_rows: bool
) -> int:
    """The rows of each expert in the batch that costs least; 0 where none costs less than a loop.

    sums_rows: it is for multiply_transposed.
    """
    num_rows, num_experts = ends.num_rows, len(ends.listed)
    won = _most_won(num_experts, num_rows, matrix_shape, dtype, sums_rows)
    if won <= 0:
        return 0
    counts = _counts(ends.listed)
    per_row, copy = math.prod(matrix_shape), _copy(matrix_shape, sums_rows)
    # Experts without rows cost nothing alone; a batch reads their matrices.
    won -= counts.count(0) * (_AROUND_PRODUCT + _COPY * per_row)
    best, best_won, beyond = 0, 0.0, 0
    largest = sorted(counts, reverse=True)[: num_experts // 4 + 1]
    for larger, count in enumerate(largest):
        size = few_sizes(count)
        rows = num_experts * size
        if 0 < size <= num_rows and rows <= _MOST_ROWS * num_rows:
            more = max(rows - num_rows, 0)
            again = beyond if sums_rows else beyond - larger * size
            cost = (more + max(again, 0)) * per_row + more * copy
            cost += _AROUND_BEYOND * _AROUND_PRODUCT * larger
            if cost < won - best_won:
                best, best_won = size, won - cost
        beyond += count
    return best


def _most_won(
    num_experts: int,
    num_rows: int,
    matrix_shape: tuple[int, int],
    dtype: torch.dtype,
    sums_rows: bool,
) -> float:
    """Against a product for each expert, by a batch of the same rows."""
    if dtype == torch.float32:
        return 0.0
    per_row = _copy(matrix_shape, sums_rows) + _WON * math.prod(matrix_shape)
    return _AROUND_PRODUCT * (num_experts - _AROUND_BATCH) - num_rows * per_row


def _copy(matrix_shape: tuple[int, int], sums_rows: bool) -> float:
    """Of one row of both operands, or of the operand and the product."""
    return _COPY * (1 + sums_rows) * sum(matrix_shape)


def few_sizes(count: int) -> int:
    """`count`, rounded up by less than a sixteenth.

    oneDNN compiles a product for each shape it meets, 0.3 ms each, and every step has other counts.
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


class Batch:
    """The first `size` rows of each expert, side by side; one of fewer has neighbours' among them.

    What an expert has beyond them stands behind the batch. Rows from the last end on are in neither.
    """

    def __init__(self, ends: tuple[int, ...], num_rows: int, size: int) -> None:
        counts, starts = _counts(ends), [0, *ends[:-1]]
        self.num_experts, self.num_rows, self.size, self.tail = len(ends), num_rows, size, ends[-1]
        firsts = [min(start, num_rows - size) for start in starts]
        shifts = [e * size - first for e, first in enumerate(firsts)]
        table = torch.tensor([firsts, shifts, counts, starts], device="cpu")
        self._firsts, shift_of, self._counts, self._starts = table.unbind(0)
        # The place of each row: of its product, where all products stand in one matrix.
        self.places = torch.repeat_interleave(shift_of, self._counts, output_size=self.tail)
        self.places += torch.arange(self.tail, device="cpu")
        # (expert, rows, places) of what is beyond.
        self.beyond: list[tuple[int, slice, slice]] = []
        self.num_places = self.num_experts * size
        for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end - start > size:
                rows = slice(start + size, end)
                places = slice(self.num_places, self.num_places + end - rows.start)
                self.places[rows] = torch.arange(places.start, places.stop, device="cpu")
                self.beyond.append((e, rows, places))
                self.num_places = places.stop

    @functools.cached_property
    def _others(self) -> torch.Tensor:
        """Which places of the batch hold a row that is not the expert's."""
        # From 0 on, and less than the expert's count, for its own rows.
        row = torch.arange(self.size, device="cpu") + (self._firsts - self._starts)[:, None]
        return ((row < 0) | (row >= self._counts[:, None])).flatten().nonzero().flatten()

    @functools.cached_property
    def _rows(self) -> torch.Tensor:
        """The row at each place of the batch."""
        return (torch.arange(self.size, device="cpu") + self._firsts[:, None]).flatten()

    def products(
        self, rows: torch.Tensor, matrices: torch.Tensor, sources: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows[i] @ matrices[e] of each row i of each expert e, at its place, (num_places, N).

        With sources it is rows[sources[i]].
        """
        products = rows.new_empty(self.num_places, matrices.shape[2])
        batch = products[: self.num_experts * self.size]
        batch = batch.unflatten(0, (self.num_experts, self.size))
        torch.bmm(self._blocks(rows, sources), matrices, out=batch)
        for e, own, places in self.beyond:
            x = rows[own] if sources is None else rows.index_select(0, sources[own])
            torch.mm(x, matrices[e], out=products[places])
        return products

    def multiply(
        self, rows: torch.Tensor, matrices: torch.Tensor, sources: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`products` in the order of the rows (R, N), zero for the rows of no expert."""
        products = self.products(rows, matrices, sources)
        if self.tail == self.num_rows:
            return products.index_select(0, self.places)
        output = products.new_zeros(self.num_rows, products.shape[1])
        output[: self.tail] = products.index_select(0, self.places)
        return output

    def multiply_transposed(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """sum_i outer(left[i], right[i]) over each expert's rows, (E, left's size, right's size)."""
        # In both: zero times a neighbour's NaN would be NaN.
        left_blocks, right_blocks = (self._blocks(t) for t in (left, right))
        for blocks in (left_blocks, right_blocks):
            blocks.flatten(0, 1).index_fill_(0, self._others, 0)
        output = torch.bmm(left_blocks.mT, right_blocks)
        for e, rows, _ in self.beyond:
            own = slice(rows.start - self.size, rows.stop)
            torch.mm(left[own].t(), right[own], out=output[e])
        return output

    def _blocks(self, rows: torch.Tensor, sources: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of the batch (E, size, width), a copy."""
        if sources is not None:
            blocks = rows.index_select(0, sources.index_select(0, self._rows))
            return blocks.unflatten(0, (self.num_experts, self.size))
        num_rows, width = rows.shape
        pitch, step = rows.stride()
        windows = rows.as_strided(
            (num_rows - self.size + 1, self.size, width), (pitch, pitch, step)
        )
        return windows.index_select(0, self._firsts)


# Few: a batch keeps its rows' places, 8 bytes each.
@functools.lru_cache(maxsize=32)
def batch_of(ends: ExpertEnds, size: int) -> Batch:
    return Batch(ends.listed, ends.num_rows, size)


def _counts(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise([0, *ends])]
