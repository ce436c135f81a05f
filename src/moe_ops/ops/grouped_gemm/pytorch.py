# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its backward in PyTorch.

T tokens, K top_k, R = T * K routed rows in expert order, E experts, N out_features, D in_features.

Router weights are multiplied before the product is rounded, so that with them it is taken in fp32
(fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._pytorch.dequantize import matrices
from moe_ops._pytorch.products import Products
from moe_ops._pytorch.rows import (
    rows_of_slots,
    slots_of_rows,
    sum_slots,
    tokens_of_rows,
    weights_of_rows,
)
from moe_ops.quantization.stored import StoredWeight


def grouped_gemm(
    input: Tensor,
    weight: Tensor | StoredWeight,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    products = Products(token_counts, num_rows)
    tokens = slots = None
    if gather_indices is not None:
        tokens = tokens_of_rows(gather_indices, top_k) if permute_x else None
        slots = slots_of_rows(gather_indices).long() if permute_y else None

    exact = input.dtype if topk_weights is None else _wide(input.dtype)
    matrix = matrices(weight, input.dtype).mT
    output = products.multiply(input, matrix, bias, sources=tokens, dtype=exact)  # (R, N)
    if topk_weights is not None:
        # The rows of no expert are zero. Their weights may be NaN.
        used = slice(products.tail)
        output[used] *= weights_of_rows(topk_weights, gather_indices)[used]
    output = output.to(input.dtype)
    if slots is None:
        return output
    return torch.zeros_like(output).index_copy_(0, slots, output)


def grouped_gemm_dx(
    grad_output: Tensor,
    weight: Tensor | StoredWeight,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    input: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor, Tensor]:
    need_input, need_weights = needs
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    dtype, wide = grad_output.dtype, _wide(grad_output.dtype)
    products = Products(token_counts, grad_output.shape[0])
    used = slice(products.tail)
    slots = tokens = None
    if gather_indices is not None:
        slots = slots_of_rows(gather_indices) if permute_y else None
        tokens = tokens_of_rows(gather_indices, top_k) if permute_x else None

    exact = dtype if topk_weights is None else wide
    matrix = matrices(weight, dtype)
    grad_rows = products.multiply(grad_output, matrix, sources=slots, dtype=exact)  # (R, D)
    if need_weights:
        assert topk_weights is not None  # the schema's `where` says so
        assert input is not None
        dots = grad_rows.new_zeros(products.num_rows)
        x = input if tokens is None else input.index_select(0, tokens)
        dots[used] = torch.linalg.vecdot(grad_rows[used], x[used].to(wide))
        if bias is not None:
            dy = grad_output if slots is None else grad_output.index_select(0, slots)
            biases = bias.index_select(0, products.experts_of_rows(bias.device))
            dots[used] += torch.linalg.vecdot(dy[used].to(wide), biases.to(wide))
        if gather_indices is not None:
            dots = dots.index_select(0, rows_of_slots(gather_indices, None))
        grad_topk_weights = dots.reshape(topk_weights.shape).to(topk_weights.dtype)
    if need_input:
        if topk_weights is not None:
            grad_rows[used] *= weights_of_rows(topk_weights, gather_indices)[used]
        grad_input = grad_rows.to(dtype)
        if permute_x:
            assert gather_indices is not None
            grad_input = sum_slots(grad_input, rows_of_slots(gather_indices, None), None, top_k)
    return grad_input, grad_topk_weights


def grouped_gemm_dw(
    grad_output: Tensor,
    input: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = needs
    grad_weight, grad_bias = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_weight, grad_bias
    dtype = grad_output.dtype
    products = Products(token_counts, grad_output.shape[0])
    dy, x = grad_output, input
    if gather_indices is not None and permute_y:
        dy = dy.index_select(0, slots_of_rows(gather_indices))  # (R, N)
    if topk_weights is not None:
        dy = dy * weights_of_rows(topk_weights, gather_indices)

    if need_bias:
        grad_bias = products.sum_by_expert(dy, dtype)
    if need_weight:
        if gather_indices is not None and permute_x:
            x = x.index_select(0, tokens_of_rows(gather_indices, top_k))  # (R, D)
        left, right = (x, dy) if transposed else (dy, x)
        grad_weight = products.multiply_transposed(left, right, dtype)
        grad_weight = grad_weight.mT if transposed else grad_weight
    return grad_weight, grad_bias


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
