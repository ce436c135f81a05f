# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its backward in PyTorch: one product per expert that has rows, or one of many.

M rows, N out_features, D in_features, E experts, R = T * K routed rows in expert order.

Reading token_counts costs nothing on a CPU. Rows are gathered expert by expert, so that they are
in the cache when they are multiplied. docs/performance.md has the measurements behind the choices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

from moe_ops._pytorch.batched_gemm import batch_of, batch_size, few_sizes, may_batch
from moe_ops._pytorch.rows import (
    ExpertEnds,
    Routing,
    expert_ends,
    rows_of_slots,
    sum_slots,
    tokens_of_rows,
)


def grouped_gemm(
    input: torch.Tensor,
    weight: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    plain = topk_weights is None and bias is None and not permute_y
    if plain and (grouped_mm := _grouped_mm(token_counts, num_rows, input, weight)):
        tokens = None
        if gather_indices is not None and permute_x:
            tokens = tokens_of_rows(gather_indices, top_k)
        return grouped_mm.multiply(input, weight.mT, token_counts, tokens)

    # The weight of a row is applied before the downcast, which needs the product in fp32.
    dtype = _product_dtype(input.dtype, exact=topk_weights is not None)
    routing = Routing(gather_indices, topk_weights, top_k, num_rows, dtype)
    sources = routing.tokens if permute_x else None
    groups = _Groups(token_counts, num_rows)
    output = input.new_empty(num_rows, weight.shape[1])
    if permute_y:
        output.zero_()
    in_place = not permute_y and dtype == output.dtype
    input, matrices = _dense(input), _dense(weight).mT.unbind(0)
    for e, rows, block, own in groups:
        x = input[block] if sources is None else input.index_select(0, sources[block])
        # What a block has after the expert's rows, the next expert's product overwrites.
        out = output[block] if in_place and own.start == 0 else None
        y = _product(x, matrices[e], None if bias is None else bias[e], out, dtype)
        if topk_weights is not None:
            y[own].mul_(routing.scale[rows])
        if permute_y:
            output.index_copy_(0, routing.slots[rows], y[own].to(output.dtype))
        elif y is not out:
            output[rows] = y[own]
    if not permute_y:
        output[groups.tail :].zero_()
    return output


def grouped_gemm_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    input: torch.Tensor | None,
    bias: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = grad_output.shape[0]
    plain = topk_weights is None and not permute_x and needs[0]
    if plain and (grouped_mm := _grouped_mm(token_counts, num_rows, grad_output, weight)):
        slots, unneeded = None, grad_output.new_empty(0)
        if gather_indices is not None and permute_y:
            slots = tokens_of_rows(gather_indices, 1)
        return grouped_mm.multiply(grad_output, weight, token_counts, slots), unneeded

    dtype = _product_dtype(grad_output.dtype, exact=topk_weights is not None)
    accumulator = torch.promote_types(dtype, torch.float32)
    routing = Routing(gather_indices, topk_weights, top_k, num_rows, dtype)
    sources = routing.slots if permute_y else None
    groups = _Groups(token_counts, num_rows)
    grad_rows = grad_output.new_empty(num_rows if needs[0] else 0, weight.shape[2])
    dots = torch.zeros(num_rows if needs[1] else 0, dtype=accumulator, device=grad_output.device)
    in_place = needs[0] and dtype == grad_rows.dtype
    grad_output, matrices = _dense(grad_output), _dense(weight).unbind(0)
    for e, rows, block, own in groups if any(needs) else ():
        dy = grad_output[block] if sources is None else grad_output.index_select(0, sources[block])
        # What a block has after the expert's rows, the next expert's product overwrites.
        out = grad_rows[block] if in_place and own.start == 0 else None
        dx = _product(dy, matrices[e], None, out, dtype)
        if needs[1]:
            assert input is not None  # the schema's `where` says so
            x = input.index_select(0, routing.tokens[rows]) if permute_x else input[rows]
            dot = torch.linalg.vecdot(dx[own].to(accumulator), x.to(accumulator))
            if bias is not None:
                dot += dy[own].to(accumulator) @ bias[e].to(accumulator)
            dots[rows] = dot
        if topk_weights is not None and needs[0]:
            dx[own].mul_(routing.scale[rows])
        if needs[0] and dx is not out:
            grad_rows[rows] = dx[own]
    grad_rows[groups.tail :].zero_()

    grad_input, grad_topk_weights = grad_rows, dots
    if needs[0] and permute_x:
        assert gather_indices is not None
        grad_input = sum_slots(grad_rows, rows_of_slots(gather_indices, None), None, top_k)
    if needs[1]:
        assert topk_weights is not None
        if gather_indices is not None:
            dots = dots.index_select(0, rows_of_slots(gather_indices, None))
        grad_topk_weights = dots.reshape(topk_weights.shape).to(topk_weights.dtype)
    return (
        grad_input if needs[0] else grad_output.new_empty(0),
        grad_topk_weights if needs[1] else grad_output.new_empty(0),
    )


def grouped_gemm_dw(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = grad_output.shape[0]
    plain = topk_weights is None and not permute_y and needs == [True, False]
    if plain and (grouped_mm := _grouped_mm(token_counts, num_rows, grad_output, input)):
        x, unneeded = input, grad_output.new_empty(0)
        if gather_indices is not None and permute_x:
            x = input.index_select(0, tokens_of_rows(gather_indices, top_k))
        left, right = (x, grad_output) if transposed else (grad_output, x)
        stored = grouped_mm.multiply_transposed(left, right, token_counts)
        return stored.mT if transposed else stored, unneeded

    dtype = _product_dtype(grad_output.dtype, exact=topk_weights is not None)
    accumulator = torch.promote_types(dtype, torch.float32)
    routing = Routing(gather_indices, topk_weights, top_k, num_rows, dtype)
    groups = _Groups(token_counts, num_rows)
    num_experts = token_counts.shape[0]
    out_features, in_features = grad_output.shape[1], input.shape[1]
    grad_weight, grad_bias = grad_output.new_empty(0), grad_output.new_empty(0)
    if needs[0]:
        sizes = (in_features, out_features) if transposed else (out_features, in_features)
        stored = grad_output.new_empty(num_experts, *sizes)
        grad_weight = stored.mT if transposed else stored
        matrices = stored.unbind(0)
        for e in groups.without_rows():
            matrices[e].zero_()
    if needs[1]:
        grad_bias = grad_output.new_zeros(num_experts, out_features)

    grad_output, input = _dense(grad_output), _dense(input)
    for e, rows, block, _ in groups if any(needs) else ():
        dy = grad_output.index_select(0, routing.slots[rows]) if permute_y else grad_output[rows]
        if topk_weights is not None:
            dy = dy * routing.scale[rows]
        if needs[1]:
            grad_bias[e] = dy.sum(0, dtype=accumulator)
        if needs[0]:
            x = input.index_select(0, routing.tokens[rows]) if permute_x else input[rows]
            if missing := block.stop - block.start - len(x):
                # Here a neighbour's rows would be summed too.
                dy, x = (functional.pad(t, (0, 0, 0, missing)) for t in (dy, x))
            left, right = (x.t(), dy) if transposed else (dy.t(), x)
            out = matrices[e] if dtype == stored.dtype else None
            product = _product(left, right, None, out, dtype)
            if product is not out:
                matrices[e].copy_(product)
    return grad_weight, grad_bias


def batched_products(
    rows: torch.Tensor, matrices: torch.Tensor, token_counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For who moves the rows of grouped_gemm(rows, matrices.mT) anyway: (products, places).

    The product of row i is products[places[i]]; the rows of no expert have no place. None where no
    batch is the best way to multiply, as grouped_gemm would.
    """
    grouped_mm = _grouped_mm(token_counts, rows.shape[0], rows, matrices)
    if grouped_mm is None or not grouped_mm.may_batch:
        return None
    ends = expert_ends(token_counts, rows.shape[0])
    size = _batch_size(grouped_mm.product, ends)
    if not size:
        return None
    batch = batch_of(ends, size)
    return batch.products(rows, matrices), batch.places


@dataclass(frozen=True, eq=False, slots=True)
class _Product:
    """What the choice of a batch depends on beside the counts; one object for each, see _product_of.

    Attributes:
        matrix_shape: of each expert's matrix, or of its sum over rows.
        sums_rows: for multiply_transposed.
    """

    matrix_shape: tuple[int, int]
    dtype: torch.dtype
    sums_rows: bool


# The same object for the same sizes: forward and dX of a projection share it.
_product_of = functools.lru_cache(maxsize=4096)(_Product)


@dataclass(frozen=True, eq=False, slots=True)
class _GroupedMM:
    """functional.grouped_mm of operands of certain sizes, or many small experts as one product.

    What runs between large products finds the caches empty, so that each name that is looked up,
    each function that is called, counts, and what can be done before a product is not left until
    after it.

    Attributes:
        num_rows: of the left operand, after a gather.
        may_batch: whether there are counts for which a batch is the best.
    """

    num_rows: int
    product: _Product
    may_batch: bool

    def multiply(
        self,
        rows: torch.Tensor,
        matrices: torch.Tensor,
        token_counts: torch.Tensor,
        sources: torch.Tensor | None,
    ) -> torch.Tensor:
        """rows[i] @ matrices[e] of each row i of each expert e, zero for the rows of no expert.

        With sources it is rows[sources[i]].
        """
        ends = expert_ends(token_counts, self.num_rows)
        if self.may_batch and (size := _batch_size(self.product, ends)):
            return batch_of(ends, size).multiply(rows, matrices, sources)
        x = rows if sources is None else rows.index_select(0, sources)
        has_tail = ends.tail < self.num_rows
        output = _torch_grouped_mm(x, matrices, offs=ends.tensor)
        if has_tail:
            output[ends.tail :].zero_()
        return output

    def multiply_transposed(
        self, left: torch.Tensor, right: torch.Tensor, token_counts: torch.Tensor
    ) -> torch.Tensor:
        """sum_i outer(left[i], right[i]) over each expert's rows."""
        ends = expert_ends(token_counts, self.num_rows)
        if self.may_batch and (size := _batch_size(self.product, ends)):
            return batch_of(ends, size).multiply_transposed(left, right)
        return _torch_grouped_mm(left.t(), right, offs=ends.tensor)


# Both stand for what they were made of, so that a lookup compares no sizes and no counts.
@functools.lru_cache(maxsize=256)
def _batch_size(product: _Product, ends: ExpertEnds) -> int:
    """The rows of each expert in the batch that is the best for these counts; 0 if none is."""
    shape, dtype = product.matrix_shape, product.dtype
    return batch_size(ends, shape, dtype, sums_rows=product.sums_rows)


# What functional.grouped_mm calls, where torch has it: without a Python function around it.
_torch_grouped_mm = getattr(torch, "_grouped_mm", functional.grouped_mm)


def _grouped_mm(
    token_counts: torch.Tensor, num_rows: int, left: torch.Tensor, right: torch.Tensor
) -> _GroupedMM | None:
    """How to multiply num_rows rows, where functional.grouped_mm applies and is the faster.

    `left` are rows, or what they are gathered from. `right` are a matrix for each expert, or, where
    the product sums over rows, other rows; which of the two is then transposed makes no difference.
    """
    if not left.is_cpu:
        return None
    return _grouped_mm_of(
        token_counts.shape[0], num_rows, left.dtype,
        left.shape, left.stride(), right.shape, right.stride(),
    )  # fmt: skip


# By sizes and strides, of which a model has few; the counts are others in every step.
@functools.lru_cache(maxsize=4096)
def _grouped_mm_of(
    num_experts: int,
    num_rows: int,
    dtype: torch.dtype,
    left_shape: Sequence[int],
    left_stride: Sequence[int],
    right_shape: Sequence[int],
    right_stride: Sequence[int],
) -> _GroupedMM | None:
    sums_rows = len(right_shape) == 2
    matrix_shape = (left_shape[1] if sums_rows else right_shape[1], right_shape[-1])
    pitches = (_pitch(left_shape, left_stride), _pitch(right_shape, right_stride))
    if not _grouped_mm_is_best(num_experts, num_rows, matrix_shape, dtype, sums_rows, pitches):
        return None
    may = may_batch(num_experts, num_rows, matrix_shape, dtype, sums_rows=sums_rows)
    return _GroupedMM(num_rows, _product_of(matrix_shape, dtype, sums_rows), may)


# The mean multiplications per expert from which a loop over oneDNN's fp32 products, in Python, is
# faster than functional.grouped_mm, on CPUs where oneDNN's are the faster ones; the second where
# the products sum over rows.
_LARGE_FP32, _LARGE_FP32_SUMS = 2**23, 2**25


def _grouped_mm_is_best(
    num_experts: int,
    num_rows: int,
    matrix_shape: tuple[int, int],
    dtype: torch.dtype,
    sums_rows: bool,
    pitches: tuple[int, int],
) -> bool:
    """Whether functional.grouped_mm, whose loop over the experts is in C++, applies and is faster.

    It wants whole 16 bytes from a row to the next, 8 elements here, and something to multiply.
    """
    if not (num_experts and num_rows and all(matrix_shape)):
        return False
    if dtype == torch.float32:
        large = num_experts * (_LARGE_FP32_SUMS if sums_rows else _LARGE_FP32)
        if num_rows * matrix_shape[0] * matrix_shape[1] >= large and _prefers_onednn():
            return False
    elif dtype == torch.float64 or not _is_native(dtype):
        return False
    return all(size > 0 and size % 8 == 0 for size in (*matrix_shape, *pitches))


class _Groups:
    """The rows of each expert.

    Iterates over (e, rows, block, own) of the experts that have rows. oneDNN compiles a product for
    each shape it meets, 0.3 ms each, and every step has other counts; so it is given the rows of
    `block`, which are the expert's and a few of its neighbours', in one of few sizes. block[own]
    are the expert's.
    """

    def __init__(self, token_counts: torch.Tensor, num_rows: int) -> None:
        self.num_rows = num_rows
        ends = expert_ends(token_counts, num_rows)
        self.ends, self.tail = ends.listed, ends.tail

    def __iter__(self) -> Iterator[tuple[int, slice, slice, slice]]:
        start = 0
        for e, end in enumerate(self.ends):
            if start < end:
                size = min(few_sizes(end - start), self.num_rows)
                first = min(start, self.num_rows - size)
                block, own = slice(first, first + size), slice(start - first, end - first)
                yield e, slice(start, end), block, own
            start = end

    def without_rows(self) -> list[int]:
        starts = [0, *self.ends]
        return [e for e, (start, end) in enumerate(pairwise(starts)) if start == end]


def _pitch(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a row to the next, or from a column to the next; 0 if neither is dense."""
    rows, columns = stride[-2:]
    if columns == 1 and rows >= shape[-1]:
        return rows
    return columns if rows == 1 and columns >= shape[-2] else 0


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _pitch(tensor.shape, tensor.stride()) else tensor.contiguous()


def _product(
    left: torch.Tensor,
    right: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """left @ right + bias in `dtype`; `out` may be used to store it, and is then what is returned."""
    if not left.dtype == right.dtype == dtype:
        left, right = left.to(dtype), right.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # oneDNN reads a bias of other strides wrongly.
    bias = None if bias is None else bias.contiguous()
    large = left.shape[0] * right.numel() >= 2**21
    if dtype == torch.float32 and large and left.is_cpu and _prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    if bias is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right, out=out)


def _product_dtype(dtype: torch.dtype, *, exact: bool) -> torch.dtype:
    """The dtype to multiply in.

    It is fp32 where more must happen before the downcast, or where the CPU has no instructions for
    `dtype`: a product in fp16 is then 3 to 90 times slower than one in fp32.
    """
    if dtype in (torch.float32, torch.float64):
        return dtype
    return dtype if not exact and _is_native(dtype) else torch.float32


@functools.cache
def _is_native(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def _prefers_onednn() -> bool:
    """Whether oneDNN's fp32 product is to be used in place of torch.mm, which is MKL's on x86.

    MKL uses AVX-512 on Intel's CPUs alone. oneDNN, which uses it on all, is twice as fast on AMD's
    Zen 5, and slower on Zen 4, which has instructions of 512 bits but multiplies 256 at a time.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.backends.mkldnn.is_available() and _amd_family() >= _ZEN_5


_ZEN_5 = 26


def _amd_family() -> int:
    """The family of an AMD CPU, 0 for another."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    return int(family[1]) if family and "AuthenticAMD" in text else 0
