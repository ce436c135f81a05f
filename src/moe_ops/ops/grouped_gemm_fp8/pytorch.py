# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm_fp8 and its backward in PyTorch: one expert's weight is dequantised at a time.

T tokens, K top_k, R = T * K routed rows in expert order, E experts, N out_features, D in_features.

Products are taken in fp32 (fp64 for fp64): a weight times its scale is no bf16 number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._pytorch.products import Products
from moe_ops._pytorch.rows import (
    rows_of_slots,
    slots_of_rows,
    sum_slots,
    tokens_of_rows,
    weights_of_rows,
)
from moe_ops.fp8 import dequantized


def grouped_gemm_fp8(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    wide = torch.promote_types(input.dtype, torch.float32)
    if permute_x:
        assert gather_indices is not None  # the schema's `where` says so
        input = input.index_select(0, tokens_of_rows(gather_indices, top_k))
    scale = None if topk_weights is None else weights_of_rows(topk_weights, gather_indices)
    output = input.new_zeros(num_rows, weight.shape[1])
    for e, rows in Products(token_counts, num_rows).experts():
        y = input[rows].to(wide) @ dequantized(weight[e], weight_scale[e], wide).t()
        output[rows] = y if scale is None else y.mul_(scale[rows])
    if not permute_y:
        return output
    assert gather_indices is not None
    # Rows of no expert are zero wherever they go.
    return torch.zeros_like(output).index_copy_(0, slots_of_rows(gather_indices).long(), output)


def grouped_gemm_fp8_dx(
    grad_output: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    input: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor, Tensor]:
    need_input, need_weights = needs
    num_rows = grad_output.shape[0]
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    scale = None if topk_weights is None else weights_of_rows(topk_weights, gather_indices)
    slots = tokens = None
    if gather_indices is not None:
        slots = slots_of_rows(gather_indices) if permute_y else None
        tokens = tokens_of_rows(gather_indices, top_k) if permute_x else None
    dy = grad_output if slots is None else grad_output.index_select(0, slots)
    grad_rows = grad_output.new_zeros(num_rows if need_input else 0, weight.shape[2])
    dots = grad_output.new_zeros(num_rows if need_weights else 0, dtype=wide)
    for e, rows in Products(token_counts, num_rows).experts():
        dx = dy[rows].to(wide) @ dequantized(weight[e], weight_scale[e], wide)
        if need_weights:
            assert input is not None  # the schema's `where` says so
            x = input[rows] if tokens is None else input.index_select(0, tokens[rows])
            dots[rows] = torch.linalg.vecdot(dx, x.to(wide))
        if need_input:
            grad_rows[rows] = dx if scale is None else dx.mul_(scale[rows])
    if need_input:
        grad_input = grad_rows
        if permute_x:
            assert gather_indices is not None
            grad_input = sum_slots(grad_rows, rows_of_slots(gather_indices, None), None, top_k)
    if need_weights:
        assert topk_weights is not None
        if gather_indices is not None:
            dots = dots.index_select(0, rows_of_slots(gather_indices, None))
        grad_topk_weights = dots.reshape(topk_weights.shape).to(topk_weights.dtype)
    return grad_input, grad_topk_weights
