# SPDX-License-Identifier: Apache-2.0
"""The products of rows in expert order with the matrices of their experts.

R rows in expert order, E experts, matrices of K x N.

There are three ways to multiply. functional.grouped_mm takes all experts in one call, and multiplies
one after the other with all threads. Where experts are small, what stands around each product is
most of the time: then torch.bmm multiplies blocks of equal size, one for each expert. Where neither
applies (a bias, a CUDA device, other dtypes and strides) there is a loop over the experts.
docs/notes/cpu.md has the measurements behind the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

# The costs by which blocks are chosen, in multiplications, measured on Zen 4 in bf16: what stands
# around the product of one expert, and what it costs to copy an element.
_AROUND_PRODUCT = 5 * 2**20
_COPY = 10
# Blocks must save this part of all multiplications, and have at most so many rows for each row.
_LEAST_GAIN = 1 / 32
_MOST_ROWS = 2


class Products:
    """The products of one call: made at its start, and used for each of its projections.

    Corrupt counts are clamped: they give unspecified values, never an access out of bounds.

    Attributes:
        num_rows: R.
        ends: where each expert's rows end.
        tail: the rows from here on belong to no expert.
    """

    def __init__(self, token_counts: Tensor, num_rows: int) -> None:
        counts = token_counts.tolist()
        ends = list(accumulate(counts))
        if ends and (min(counts) < 0 or ends[-1] > num_rows):
            clamped = accumulate(min(max(count, 0), num_rows) for count in counts)
            ends = [min(end, num_rows) for end in clamped]
        self.num_rows, self.ends, self.tail = num_rows, ends, ends[-1] if ends else 0

    def experts(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, and its rows."""
        for e, (start, end) in enumerate(pairwise([0, *self.ends])):
            if start < end:
                yield e, slice(start, end)

    def multiply(
        self,
        rows: Tensor,
        matrices: Tensor,
        bias: Tensor | None = None,
        *,
        sources: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return rows[i] @ matrices[e] + bias[e] for each row i of each expert e, else zero, (R, N).

        With sources (R,), row i is rows[sources[i]]. dtype is the result's, by default that of rows.
        """
        _, k, n = matrices.shape
        dtype = dtype or rows.dtype
        # Rows that are gathered are copied, dense.
        is_aligned = _is_aligned(rows) if sources is None else k * rows.itemsize % 16 == 0
        is_plain = bias is None and dtype == rows.dtype
        if is_plain and is_aligned and self._in_one_call(rows, matrices):
            if size := self._block_size(k, n, dtype):
                return self._multiply_blocks(rows, matrices, sources, size)
            x = rows if sources is None else rows.index_select(0, sources)
            output = F.grouped_mm(x, matrices, offs=self._offsets())
        else:
            output = rows.new_empty(self.num_rows, n, dtype=dtype)
            for e, own in self.experts():
                x = rows[own] if sources is None else rows.index_select(0, sources[own])
                output[own] = _product(x, matrices[e], None if bias is None else bias[e], dtype)
        output[self.tail :].zero_()
        return output

    def multiply_transposed(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return sum_i outer(left[i], right[i]) over the rows of each expert, (E, K, N)."""
        k, n = left.shape[1], right.shape[1]
        if left.dtype == dtype and _is_aligned(left) and self._in_one_call(left, right):
            if size := self._block_size(k, n, dtype):
                return self._multiply_transposed_blocks(left, right, size)
            return F.grouped_mm(left.t(), right, offs=self._offsets())
        output = left.new_zeros(len(self.ends), k, n, dtype=dtype)
        for e, own in self.experts():
            output[e] = _product(left[own].t(), right[own], None, dtype)
        return output

    def sum_by_expert(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum of the rows of each expert, (E, N), summed in fp32 (fp64 for fp64)."""
        output = rows.new_zeros(len(self.ends), rows.shape[1], dtype=dtype)
        for e, own in self.experts():
            output[e] = rows[own].sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        return output

    def experts_of_rows(self, device: torch.device) -> Tensor:
        """Return the expert of each row that has one, (tail,)."""
        counts = torch.tensor(self._counts(), device="cpu")
        return torch.repeat_interleave(counts, output_size=self.tail).to(device)

    def _counts(self) -> list[int]:
        return [end - start for start, end in pairwise([0, *self.ends])]

    def _in_one_call(self, left: Tensor, right: Tensor) -> bool:
        """Whether functional.grouped_mm applies to an aligned left, with a result of dense rows."""
        return (
            left.is_cpu
            and left.dtype == right.dtype != torch.float64
            and _multiplies_in(left.dtype) == left.dtype
            and bool(self.ends and self.num_rows and left.numel() and right.numel())
            and _is_aligned(right)
            and right.shape[-1] * right.itemsize % 16 == 0
        )

    def _offsets(self) -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int32, device="cpu")

    # The blocks are the first `size` rows of each expert, side by side. The block of an expert with
    # fewer rows holds rows of its neighbours too. The rows that a larger expert has beyond its block
    # are a product of their own.

    def _block_size(self, k: int, n: int, dtype: torch.dtype) -> int:
        """Return the rows of the blocks that cost least; 0 where a product for each expert does."""
        num_experts, per_row = len(self.ends), k * n
        counts = self._counts()
        # What stands around the products but for the steps around the blocks. For an expert without
        # rows there is no product, but its block reads its matrix.
        empty = counts.count(0)
        least = _AROUND_PRODUCT * (num_experts - empty - 3) - _COPY * per_row * empty
        least -= int(_LEAST_GAIN * self.num_rows * per_row)
        # Around MKL's products in fp32 stands too little to pay for the copies.
        if dtype == torch.float32 or least <= 0:
            return 0
        best, rows_of_larger = 0, 0
        for larger, count in enumerate(sorted(counts, reverse=True)[: num_experts // 4 + 1]):
            size = _rounded_up(count)
            rows = num_experts * size
            if 0 < size <= self.num_rows and rows <= _MOST_ROWS * self.num_rows:
                # Rows beyond the blocks count as if they were more: few large experts of many small
                # ones are better multiplied alone.
                more = max(rows - self.num_rows, 0) + max(rows_of_larger - larger * size, 0)
                cost = more * per_row + rows * _COPY * (k + n) + 2 * larger * _AROUND_PRODUCT
                if cost < least:
                    best, least = size, cost
            rows_of_larger += count
        return best

    def _blocks(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the experts' rows start, how many they are, and the row at each place."""
        starts = torch.tensor([0, *self.ends[:-1]], device="cpu")
        counts = torch.tensor(self._counts(), device="cpu")
        rows = (starts[:, None] + _arange(size)).clamp_(max=self.num_rows - 1)
        return starts, counts, rows.flatten()

    def _multiply_blocks(
        self, rows: Tensor, matrices: Tensor, sources: Tensor | None, size: int
    ) -> Tensor:
        num_experts, _, n = matrices.shape
        starts, counts, block_rows = self._blocks(size)
        if sources is not None:
            block_rows = sources.index_select(0, block_rows)
        blocks = rows.index_select(0, block_rows).unflatten(0, (num_experts, size))
        products = torch.bmm(blocks, matrices).flatten(0, 1)
        # The place of each row; of rows beyond the blocks any, for they are overwritten.
        shifts = _arange(num_experts) * size - starts
        places = torch.repeat_interleave(shifts, counts, output_size=self.tail)
        places = places.add_(_arange(self.tail)).clamp_(max=len(products) - 1)
        output = rows.new_empty(self.num_rows, n)
        torch.index_select(products, 0, places, out=output[: self.tail])
        output[self.tail :].zero_()
        for e, own in self.experts():
            beyond = slice(own.start + size, own.stop)
            if beyond.start < beyond.stop:
                x = rows[beyond] if sources is None else rows.index_select(0, sources[beyond])
                torch.mm(x, matrices[e], out=output[beyond])
        return output

    def _multiply_transposed_blocks(self, left: Tensor, right: Tensor, size: int) -> Tensor:
        _, counts, block_rows = self._blocks(size)
        is_others = _arange(size) >= counts[:, None]
        others = is_others.flatten().nonzero().flatten()
        # Zeros in both: zero times a neighbour's NaN would be NaN.
        left_blocks, right_blocks = (
            t.index_select(0, block_rows).index_fill_(0, others, 0).unflatten(0, (-1, size))
            for t in (left, right)
        )
        output = torch.bmm(left_blocks.mT, right_blocks)
        for e, own in self.experts():
            if own.stop - own.start > size:
                torch.mm(left[own].t(), right[own], out=output[e])
        return output


def _arange(end: int) -> Tensor:
    # Whatever the default device is.
    return torch.arange(end, device="cpu")


def _rounded_up(count: int) -> int:
    """Round up by less than a sixteenth.

    oneDNN compiles a product for each shape that it meets, 0.3 ms each, and every step has other
    counts.
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


def _product(left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return left @ right + bias, multiplied in `dtype` or wider."""
    dtype = torch.promote_types(left.dtype, dtype)
    if left.is_cpu:
        dtype = _multiplies_in(dtype)
    left, right = left.to(dtype), right.to(dtype)
    # oneDNN reads a bias of other strides wrongly.
    return left @ right if bias is None else torch.addmm(bias.to(dtype).contiguous(), left, right)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether its rows or its columns are dense, and start at multiples of 16 bytes."""
    (num_rows, num_columns), (pitch, step) = tensor.shape[-2:], tensor.stride()[-2:]
    if step != 1:
        pitch, step, num_columns = step, pitch, num_rows
    return step == 1 and pitch >= num_columns and pitch * tensor.itemsize % 16 == 0


@functools.cache
def _multiplies_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a CPU multiplies: fp32 where it has no instructions for `dtype`.

    A product in fp16 or bf16 is then 3 to 90 times slower than one in fp32.
    """
    onednn = torch.ops.mkldnn
    is_native = {
        # No public function says what torch itself asks here.
        torch.bfloat16: onednn._is_mkldnn_bf16_supported,
        torch.float16: onednn._is_mkldnn_fp16_supported,
    }
    if dtype not in is_native or (torch.backends.mkldnn.is_available() and is_native[dtype]()):
        return dtype
    return torch.float32
