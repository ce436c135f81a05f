# SPDX-License-Identifier: Apache-2.0
"""Run grouped_gemm, its dX and its dW in Triton: move rows where needed, and launch the GEMMs."""

from __future__ import annotations

import torch

from moe_ops._triton.compiling import compiled_together
from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.rows import gather_rows, sum_parts, sum_rows
from moe_ops._triton.schedule import Rows, expert_offsets
from moe_ops._triton.weight_gradient import grad_bias, grad_weight
from moe_ops.quantization.stored import StoredWeight


@compiled_together
def grouped_gemm(
    input: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
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
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    divisor = top_k if permute_x else 0
    if not isinstance(weight, torch.Tensor):
        decoding = DecodingGemm.where_planned(
            input, weight, rows, kernel_config, x_divisor=divisor, bias=bias
        )
        if decoding is not None:
            output = input.new_empty(num_rows, weight.shape[1])
            decoding.launch(output, scale=topk_weights, scatter_y=permute_y)
            return output
    gemm = GroupedGemm(
        "forward",
        input,
        weight,
        rows,
        x_divisor=divisor,
        scale=topk_weights,
        bias=bias,
        scatter_y=permute_y,
        kernel_config=kernel_config,
    )
    output = input.new_empty(num_rows, weight.shape[1])
    gemm.launch(output)
    return output


@compiled_together
def grouped_gemm_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
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
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    gemm = GroupedGemm(
        "backward_dX",
        grad_output,
        weight,
        Rows.of(token_counts, num_rows, gather_indices, top_k),
        x_divisor=1 if permute_y else 0,
        scale=topk_weights,
        scatter_y=permute_x,
        has_dots=needs[1],
        kernel_config=kernel_config,
    )
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2]) if needs[0] else None
    dots = gemm.new_dots(bias is not None) if needs[1] else None
    other = None if dots is None else input
    gemm.launch(grad_rows, other=other, gather_other=permute_x, dots=dots)
    if grad_rows is not None:
        # In slot order the rows of a token are neighbours.
        grad_input = sum_rows(grad_rows, None, None, top_k) if permute_x else grad_rows
    if dots is not None and topk_weights is not None:
        if bias is not None:
            gemm.launch_bias_dots(bias, dots[-1])
        grad_topk_weights = sum_parts(dots, topk_weights)
    return grad_input, grad_topk_weights


@compiled_together
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
    grad_w, grad_b = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_w, grad_b
    # Gathering rows inside this GEMM would halve its speed, so they are copied first.
    g, x = grad_output, input
    if permute_y or topk_weights is not None:
        divisor = 1 if permute_y else 0
        g = gather_rows(g, gather_indices, topk_weights, top_k, divisor)
    offsets = expert_offsets(token_counts, g.shape[0])
    if needs[0]:
        if permute_x:
            x = gather_rows(input, gather_indices, None, top_k, top_k)
        grad_w = grad_weight(g, x, offsets, transposed, kernel_config)
    if needs[1]:
        grad_b = grad_bias(g, offsets)
    return grad_w, grad_b
