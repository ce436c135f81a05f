# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its backward in PyTorch: one product per expert that has rows.

M rows, N out_features, D in_features, E experts, R = T * K routed rows in expert order.

Reading token_counts costs nothing on a CPU. Rows are gathered expert by expert, so that they are
in the cache when they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_ops.ops.rows import rows_of_slots, sum_slots, tokens_of_rows


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
    accumulator = torch.promote_types(input.dtype, torch.float32)
    groups = _Groups(token_counts, num_rows, gather_indices, topk_weights, top_k, accumulator)
    # The weight of a row is applied before the downcast, which needs the product in fp32.
    dtype = _product_dtype(input.dtype, exact=topk_weights is not None)
    output = input.new_empty(num_rows, weight.shape[1])
    if permute_y or groups.tail < num_rows:
        output.zero_()
    matrices = weight.unbind(0)
    for e, rows in groups:
        x = groups.tokens(input, rows) if permute_x else input[rows]
        in_place = not permute_y and dtype == output.dtype
        out = output[rows] if in_place else None
        w = matrices[e].t().to(dtype)
        if bias is None:
            y = torch.mm(x.to(dtype), w, out=out)
        else:
            y = torch.addmm(bias[e].to(dtype), x.to(dtype), w, out=out)
        if topk_weights is not None:
            y.mul_(groups.scale(rows))
        if permute_y:
            output.index_copy_(0, groups.slots[rows], y.to(output.dtype))
        elif not in_place:
            output[rows] = y
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
    accumulator = torch.promote_types(grad_output.dtype, torch.float32)
    groups = _Groups(token_counts, num_rows, gather_indices, topk_weights, top_k, accumulator)
    dtype = _product_dtype(grad_output.dtype, exact=topk_weights is not None)
    grad_rows = grad_output.new_empty(num_rows if needs[0] else 0, weight.shape[2])
    dots = torch.zeros(num_rows if needs[1] else 0, dtype=accumulator, device=grad_output.device)
    if groups.tail < num_rows:
        grad_rows.zero_()
    matrices = weight.unbind(0)
    for e, rows in groups if needs[0] or needs[1] else ():
        dy = (groups.outputs(grad_output, rows) if permute_y else grad_output[rows]).to(dtype)
        in_place = needs[0] and dtype == grad_rows.dtype
        dx = torch.mm(dy, matrices[e].to(dtype), out=grad_rows[rows] if in_place else None)
        if needs[1]:
            assert input is not None  # the schema's `where` says so
            x = groups.tokens(input, rows) if permute_x else input[rows]
            dot = torch.linalg.vecdot(dx.to(accumulator), x.to(accumulator))
            if bias is not None:
                dot += dy.to(accumulator) @ bias[e].to(accumulator)
            dots[rows] = dot
        if topk_weights is not None and needs[0]:
            dx.mul_(groups.scale(rows))
        if needs[0] and not in_place:
            grad_rows[rows] = dx

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
    num_rows, out_features = grad_output.shape
    num_experts, in_features = token_counts.shape[0], input.shape[1]
    accumulator = torch.promote_types(grad_output.dtype, torch.float32)
    groups = _Groups(token_counts, num_rows, gather_indices, topk_weights, top_k, accumulator)
    dtype = _product_dtype(grad_output.dtype, exact=topk_weights is not None)
    grad_weight, grad_bias = grad_output.new_empty(0), grad_output.new_empty(0)
    if needs[0]:
        sizes = (in_features, out_features) if transposed else (out_features, in_features)
        stored = grad_output.new_empty(num_experts, *sizes)
        grad_weight = stored.transpose(1, 2) if transposed else stored
    if needs[1]:
        grad_bias = grad_output.new_zeros(num_experts, out_features)

    reached = 0
    for e, rows in groups if needs[0] or needs[1] else ():
        dy = (groups.outputs(grad_output, rows) if permute_y else grad_output[rows]).to(dtype)
        if topk_weights is not None:
            dy = dy * groups.scale(rows)
        if needs[0]:
            x = (groups.tokens(input, rows) if permute_x else input[rows]).to(dtype)
            left, right = (x.t(), dy) if transposed else (dy.t(), x)
            if dtype == stored.dtype:
                torch.mm(left, right, out=stored[e])
            else:
                stored[e] = torch.mm(left, right)
            stored[reached:e].zero_()
            reached = e + 1
        if needs[1]:
            grad_bias[e] = dy.sum(0, dtype=accumulator)
    if needs[0]:
        stored[reached:].zero_()
    return grad_weight, grad_bias


@dataclass
class _Groups:
    """The rows of each expert, and what belongs to a row; iterates over (expert, rows)."""

    token_counts: torch.Tensor
    num_rows: int
    gather_indices: torch.Tensor | None
    topk_weights: torch.Tensor | None
    top_k: int
    accumulator: torch.dtype

    def __post_init__(self) -> None:
        # Clamped: corrupt counts give unspecified values, never an access out of bounds.
        counts = self.token_counts.clamp(0, self.num_rows).long()
        self.ends: list[int] = counts.cumsum(0).clamp(max=self.num_rows).tolist()
        self.tail = self.ends[-1] if self.ends else 0
        if self.gather_indices is not None:
            self.slots = self.gather_indices.clamp(0, max(self.num_rows - 1, 0)).long()
            self._tokens = tokens_of_rows(self.gather_indices, self.top_k)
        if self.topk_weights is not None:
            weights = self.topk_weights.reshape(-1, 1)
            if self.gather_indices is not None:
                weights = weights.index_select(0, self.slots)
            self._scale = weights.to(self.accumulator)

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for e, end in enumerate(self.ends):
            if end > start:
                yield e, slice(start, end)
            start = end

    def tokens(self, rows_in_token_order: torch.Tensor, rows: slice) -> torch.Tensor:
        return rows_in_token_order.index_select(0, self._tokens[rows])

    def outputs(self, rows_in_slot_order: torch.Tensor, rows: slice) -> torch.Tensor:
        return rows_in_slot_order.index_select(0, self.slots[rows])

    def scale(self, rows: slice) -> torch.Tensor:
        return self._scale[rows]


def _product_dtype(dtype: torch.dtype, *, exact: bool) -> torch.dtype:
    """The dtype to multiply in.

    It is fp32 where more must happen before the downcast, or where the CPU has no instructions for
    `dtype`: a product in fp16 is then 3 to 90 times slower than one in fp32.
    """
    if dtype in (torch.float32, torch.float64):
        return dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.float32 if exact or not native[dtype]() else dtype
