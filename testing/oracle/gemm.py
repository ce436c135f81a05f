# SPDX-License-Identifier: Apache-2.0
"""Computes grouped_gemm and its gradients, one row at a time.

M rows of the input, R rows of the output, D in_features, N out_features, E experts.
"""

import torch
from torch import Tensor

from testing.oracle.differentiate import needed_gradients, to_fp64


def grouped_gemm(
    input: Tensor,
    weight: Tensor,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> Tensor:
    """Return (R, N) of input (M, D) and weight (E, N, D); R is M*top_k with permute_x, else M."""
    rows, weight, topk_weights, bias = to_fp64(input, weight, topk_weights, bias)
    num_rows = rows.shape[0] * top_k if permute_x else rows.shape[0]
    slots = list(range(num_rows)) if gather_indices is None else gather_indices.tolist()

    # Rows past sum(token_counts) keep these zeros and read nothing.
    output = [rows.new_zeros(weight.shape[1]) for _ in range(num_rows)]
    row = 0
    for expert, count in enumerate(token_counts.tolist()):
        for _ in range(count):
            slot = slots[row]
            x = rows[slot // top_k] if permute_x else rows[row]
            y = weight[expert] @ x
            if bias is not None:
                y = y + bias[expert]
            if topk_weights is not None:
                y = y * topk_weights[slot // top_k, slot % top_k]
            output[slot if permute_y else row] = y
            row += 1
    if not output:
        # It has no rows, but the autograd history of its inputs.
        return (rows.sum() + weight.sum()) * rows.new_zeros(0, weight.shape[1])
    return torch.stack(output)


def grouped_gemm_dx(
    grad_output: Tensor,
    weight: Tensor,
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
) -> tuple[Tensor | None, ...]:
    # The gradient of the input does not depend on the input, which may then be None.
    num_rows = grad_output.shape[0] // top_k if permute_x else grad_output.shape[0]
    arguments = {
        "input": grad_output.new_zeros(num_rows, weight.shape[2]) if input is None else input,
        "weight": weight,
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "bias": bias,
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    return needed_gradients(grouped_gemm, arguments, ["input", "topk_weights"], grad_output, needs)


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
) -> tuple[Tensor | None, ...]:
    # The gradients of weight and bias do not depend on their values.
    num_experts, out_features = token_counts.shape[0], grad_output.shape[1]
    arguments = {
        "input": input,
        "weight": grad_output.new_zeros(num_experts, out_features, input.shape[1]),
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": topk_weights,
        "bias": grad_output.new_zeros(num_experts, out_features),
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    return needed_gradients(grouped_gemm, arguments, ["weight", "bias"], grad_output, needs)
