# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its backward in PyTorch: one product per expert that has rows.

M rows, N out_features, D in_features, E experts, R = T * K routed rows in expert order.

Reading token_counts costs nothing on a CPU. Rows are gathered expert by expert, so that they are
in the cache when they are multiplied. Where experts have few rows a product takes microseconds, so
the loops take views from split and unbind, which make those of all experts in one call.
"""

from __future__ import annotations

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
    groups = _Groups(input.dtype, token_counts, num_rows, gather_indices, topk_weights, top_k)
    dtype = groups.product_dtype
    output = input.new_empty(num_rows, weight.shape[1])
    if permute_y or groups.tail:
        output.zero_()
    biases = [None] * len(groups.sizes) if bias is None else bias.to(dtype).unbind(0)
    for size, source, target, scale, matrix, row in zip(
        groups.sizes,
        groups.split(groups.tokens if permute_x else input),
        groups.split(groups.slots if permute_y else output),
        groups.scales,
        weight.transpose(1, 2).unbind(0),
        biases,
        strict=True,
    ):
        if size == 0:
            continue
        x = input.index_select(0, source) if permute_x else source
        out = target if dtype == output.dtype and not permute_y else None
        if row is None:
            y = torch.mm(_cast(x, dtype), _cast(matrix, dtype), out=out)
        else:
            y = torch.addmm(row, _cast(x, dtype), _cast(matrix, dtype), out=out)
        if scale is not None:
            y.mul_(scale)
        if permute_y:
            output.index_copy_(0, target, y.to(output.dtype))
        elif out is None:
            target.copy_(y)
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
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    num_rows = grad_output.shape[0]
    dtype = grad_output.dtype
    groups = _Groups(dtype, token_counts, num_rows, gather_indices, topk_weights, top_k)
    product, accumulator = groups.product_dtype, groups.accumulator
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2])
    if groups.tail:
        grad_rows.zero_()
    dots = torch.zeros(num_rows, dtype=accumulator, device=grad_output.device)
    for e, (size, source, target, scale, matrix, dot) in enumerate(
        zip(
            groups.sizes,
            groups.split(groups.slots if permute_y else grad_output),
            groups.split(grad_rows),
            groups.scales,
            weight.unbind(0),
            groups.split(dots),
            strict=True,
        )
    ):
        if size == 0:
            continue
        dy = _cast(grad_output.index_select(0, source) if permute_y else source, product)
        dx = torch.mm(dy, _cast(matrix, product), out=target if product == dtype else None)
        if needs[1]:
            rows = groups.rows(e)
            assert input is not None  # a `where` of the schema
            x = input.index_select(0, groups.tokens[rows]) if permute_x else input[rows]
            dot.copy_(torch.linalg.vecdot(dx.to(accumulator), x.to(accumulator)))
            if bias is not None:
                dot.add_(dy.to(accumulator) @ bias[e].to(accumulator))
        if scale is not None:
            dx.mul_(scale)
        if product != dtype:
            target.copy_(dx)

    if needs[0]:
        grad_input = grad_rows
        if permute_x and gather_indices is not None:
            grad_input = sum_slots(grad_rows, rows_of_slots(gather_indices, None), None, top_k)
    if needs[1] and topk_weights is not None:
        if gather_indices is not None:
            dots = dots.index_select(0, rows_of_slots(gather_indices, None))
        grad_topk_weights = dots.reshape(topk_weights.shape).to(topk_weights.dtype)
    return grad_input, grad_topk_weights


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
    grad_weight, grad_bias = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_weight, grad_bias
    num_rows, out_features = grad_output.shape
    num_experts, in_features = token_counts.shape[0], input.shape[1]
    dtype = grad_output.dtype
    groups = _Groups(dtype, token_counts, num_rows, gather_indices, topk_weights, top_k)
    product = groups.product_dtype
    sizes = (in_features, out_features) if transposed else (out_features, in_features)
    stored = grad_output.new_empty(num_experts if needs[0] else 0, *sizes)
    if needs[0]:
        grad_weight = stored.transpose(1, 2) if transposed else stored
    if needs[1]:
        grad_bias = grad_output.new_zeros(num_experts, out_features)
    targets = stored.unbind(0) if needs[0] else [stored] * num_experts
    for e, (size, dy_source, x_source, scale, target) in enumerate(
        zip(
            groups.sizes,
            groups.split(groups.slots if permute_y else grad_output),
            groups.split(groups.tokens if permute_x else input),
            groups.scales,
            targets,
            strict=True,
        )
    ):
        if size == 0:
            target.zero_()
            continue
        dy = _cast(grad_output.index_select(0, dy_source) if permute_y else dy_source, product)
        if scale is not None:
            dy = dy * scale
        if needs[0]:
            x = _cast(input.index_select(0, x_source) if permute_x else x_source, product)
            left, right = (x.t(), dy) if transposed else (dy.t(), x)
            if product == dtype:
                torch.mm(left, right, out=target)
            else:
                target.copy_(torch.mm(left, right))
        if needs[1]:
            grad_bias[e] = dy.sum(0, dtype=groups.accumulator)
    return grad_weight, grad_bias


class _Groups:
    """How the routed rows are divided among the experts, and what belongs to each row."""

    def __init__(
        self,
        dtype: torch.dtype,
        token_counts: torch.Tensor,
        num_rows: int,
        gather_indices: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        top_k: int,
    ) -> None:
        self.accumulator = torch.promote_types(dtype, torch.float32)
        # The weight of a row is applied before the downcast, which needs its product in fp32.
        self.product_dtype = _product_dtype(dtype, exact=topk_weights is not None)
        # Clamped: corrupt counts give unspecified values, never an access out of bounds.
        ends = token_counts.clamp(0, num_rows).long().cumsum(0).clamp_(max=num_rows).tolist()
        self.starts: list[int] = [0, *ends]
        self.sizes = [end - start for start, end in zip(self.starts, ends, strict=False)]
        self.tail = num_rows - self.starts[-1]
        if gather_indices is not None:
            self.slots = gather_indices.clamp(0, max(num_rows - 1, 0)).long()
            self.tokens = tokens_of_rows(gather_indices, top_k)
        self.scales: tuple[torch.Tensor | None, ...] = (None,) * len(self.sizes)
        if topk_weights is not None:
            weights = topk_weights.reshape(-1, 1)
            if gather_indices is not None:
                weights = weights.index_select(0, self.slots)
            self.scales = self.split(weights.to(self.accumulator))

    def rows(self, expert: int) -> slice:
        return slice(self.starts[expert], self.starts[expert + 1])

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The views of `rows` (R, ...) that belong to each expert."""
        return rows.split([*self.sizes, self.tail])[:-1]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
