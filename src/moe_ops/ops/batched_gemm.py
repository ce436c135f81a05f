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
from collections.abc import Sequence
from itertools import pairwise

import torch

# In multiplications, measured on Zen 4 in bf16: what stands around the product of one expert, and
# what copying an element costs, twice that where the rows that are not the expert's are then zeroed.
# Around MKL's products in fp32 stands too little to pay for the copies.
_AROUND_PRODUCT = 3 * 2**20
_COPY = 10
# In products: the steps around the batch, and those around the rest of an expert beyond it.
_AROUND_BATCH, _AROUND_BEYOND = 3, 2
# Rows of a batch for each row there is, at most: it bounds the memory of the copies.
_MOST_ROWS = 2
# The part of all multiplications that must be won.
_WON = 1 / 32


@functools.lru_cache(maxsize=1024)
def batch_size(
    ends: tuple[int, ...],
    num_rows: int,
    matrix_shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    sums_rows: bool,
) -> int:
    """The rows of each expert in the batch with which all products cost least; 0 for no batch."""
    if dtype == torch.float32:
        return 0
    num_experts, (d, n) = len(ends), matrix_shape
    around, per_row, copy = _AROUND_PRODUCT, d * n, _COPY * (1 + sums_rows) * (d + n)
    # Compared with a product for each expert, of the same rows.
    won = around * (num_experts - _AROUND_BATCH) - num_rows * (copy + _WON * per_row)
    if won <= 0:
        return 0
    counts = _counts(ends)
    # Experts without rows cost nothing alone; a batch reads their matrices.
    won -= counts.count(0) * (around + _COPY * per_row)
    best, best_won, beyond = 0, 0.0, 0
    largest = sorted(counts, reverse=True)[: num_experts // 4 + 1]
    for larger, count in enumerate(largest):
        size = few_sizes(count)
        rows = num_experts * size
        if 0 < size <= num_rows and rows <= _MOST_ROWS * num_rows:
            more = max(rows - num_rows, 0)
            again = beyond if sums_rows else beyond - larger * size
            cost = (more + max(again, 0)) * per_row + more * copy + _AROUND_BEYOND * around * larger
            if cost < won - best_won:
                best, best_won = size, won - cost
        beyond += count
    return best


def few_sizes(count: int) -> int:
    """`count`, rounded up by less than a sixteenth.

    oneDNN compiles a product for each shape it meets, 0.3 ms each, and every step has other counts.
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


def multiply(
    rows: torch.Tensor, matrices: torch.Tensor, ends: Sequence[int], size: int
) -> torch.Tensor:
    """rows[i] @ matrices[e] (R, N) of the rows of each expert e, zero for the other rows."""
    num_rows, num_experts, tail = rows.shape[0], len(ends), ends[-1]
    counts, starts = _counts(ends), [0, *ends[:-1]]
    first = torch.tensor([min(start, num_rows - size) for start in starts], device=rows.device)
    products = torch.bmm(_blocks(rows, first, size), matrices).flatten(0, 1)

    device = rows.device
    shifts = torch.arange(0, num_experts * size, size, device=device) - first
    repeats = torch.tensor(counts, device=device)
    found = torch.repeat_interleave(shifts, repeats, output_size=tail)
    # Those beyond `size` are multiplied below.
    found = found.add_(torch.arange(tail, device=device)).clamp_(max=num_experts * size - 1)
    if tail == num_rows:
        output = products.index_select(0, found)
    else:
        output = products.new_zeros(num_rows, products.shape[1])
        output[:tail] = products.index_select(0, found)
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count > size:
            beyond = slice(start + size, start + count)
            torch.mm(rows[beyond], matrices[e], out=output[beyond])
    return output


def multiply_transposed(
    left: torch.Tensor, right: torch.Tensor, ends: Sequence[int], size: int
) -> torch.Tensor:
    """sum_i outer(left[i], right[i]) over the rows of each expert, (E, left's size, right's size)."""
    num_rows = left.shape[0]
    counts, starts = _counts(ends), [0, *ends[:-1]]
    device = left.device
    first = torch.tensor([min(start, num_rows - size) for start in starts], device=device)
    # From 0 on, and less than the expert's count, for its own rows.
    row = torch.arange(size, device=device) + (first - torch.tensor(starts, device=device))[:, None]
    others = (row < 0) | (row >= torch.tensor(counts, device=device)[:, None])
    others = others.flatten().nonzero().flatten()
    # In both: zero times a neighbour's NaN would be NaN.
    left_blocks, right_blocks = (_blocks(t, first, size) for t in (left, right))
    for blocks in (left_blocks, right_blocks):
        blocks.flatten(0, 1).index_fill_(0, others, 0)
    output = torch.bmm(left_blocks.mT, right_blocks)
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count > size:
            own = slice(start, start + count)
            torch.mm(left[own].t(), right[own], out=output[e])
    return output


def _counts(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise([0, *ends])]


def _blocks(rows: torch.Tensor, first: torch.Tensor, size: int) -> torch.Tensor:
    """`size` rows from each of `first`, a copy."""
    num_rows, width = rows.shape
    pitch, step = rows.stride()
    windows = rows.as_strided((num_rows - size + 1, size, width), (pitch, pitch, step))
    return windows.index_select(0, first)
