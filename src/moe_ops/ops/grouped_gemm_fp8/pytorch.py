# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm_fp8 and its backward in PyTorch: one expert's weight is dequantised at a time.

M rows, N out_features, D in_features, E experts, R = T * K routed rows in expert order.

Products are taken in fp32 (fp64 for fp64): a weight times its scale is no bf16 number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from moe_ops._pytorch.rows import Routing, expert_ends, rows_of_slots, sum_slots
from moe_ops.fp8 import dequantized


def grouped_gemm_fp8(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    dtype = torch.promote_types(input.dtype, torch.float32)
    routing = Routing(gather_indices, topk_weights, top_k, num_rows, dtype)
    output = input.new_zeros(num_rows, weight.shape[1])
    for e, rows in _experts_with_rows(token_counts, num_rows):
        x = input.index_select(0, routing.tokens[rows]) if permute_x else input[rows]
        y = x.to(dtype) @ dequantized(weight[e], weight_scale[e], dtype).t()
        if topk_weights is not None:
            y.mul_(routing.scale[rows])
        if permute_y:
            output.index_copy_(0, routing.slots[rows], y.to(output.dtype))
        else:
            output[rows] = y
    return output


def grouped_gemm_fp8_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    input: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = grad_output.shape[0]
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    routing = Routing(gather_indices, topk_weights, top_k, num_rows, dtype)
    grad_rows = grad_output.new_zeros(num_rows if needs[0] else 0, weight.shape[2])
    dots = torch.zeros(num_rows if needs[1] else 0, dtype=dtype, device=grad_output.device)
    for e, rows in _experts_with_rows(token_counts, num_rows) if any(needs) else ():
        dy = grad_output.index_select(0, routing.slots[rows]) if permute_y else grad_output[rows]
        dx = dy.to(dtype) @ dequantized(weight[e], weight_scale[e], dtype)
        if needs[1]:
            assert input is not None  # the schema's `where` says so
            x = input.index_select(0, routing.tokens[rows]) if permute_x else input[rows]
            dots[rows] = torch.linalg.vecdot(dx, x.to(dtype))
        if needs[0]:
            grad_rows[rows] = dx if topk_weights is None else dx.mul_(routing.scale[rows])
    if needs[0]:
        grad_input = grad_rows
        if permute_x:
            assert gather_indices is not None
            grad_input = sum_slots(grad_rows, rows_of_slots(gather_indices, None), None, top_k)
    if needs[1]:
        assert topk_weights is not None
        if gather_indices is not None:
            dots = dots.index_select(0, rows_of_slots(gather_indices, None))
        grad_topk_weights = dots.reshape(topk_weights.shape).to(topk_weights.dtype)
    return grad_input, grad_topk_weights


def _experts_with_rows(token_counts: torch.Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    ends = expert_ends(token_counts, num_rows)
    for e, (start, end) in enumerate(pairwise([0, *ends.listed])):
        if start < end:
            yield e, slice(start, end)
