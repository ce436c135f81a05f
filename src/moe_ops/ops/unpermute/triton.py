# SPDX-License-Identifier: Apache-2.0
"""Run unpermute and its backward in Triton: allocate, and launch their kernels."""

from __future__ import annotations

import torch

from moe_ops._triton.launch import launch, next_power_of_2
from moe_ops._triton.rows import inverse_permutation, sum_rows
from moe_ops.ops.unpermute.kernels import _unpermute_bwd_kernel

# A program of the backward, on four warps, holds this many bytes of rows at a time.
_BLOCK_BYTES = 8192


def unpermute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    top_k: int = 1,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = inverse_permutation(gather_indices) if scatter_indices is None else scatter_indices
    return sum_rows(input, rows, topk_weights, top_k)


def unpermute_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    top_k: int,
    scatter_indices: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, hidden_size = input.shape
    grad_input = grad_output.new_empty((num_rows, hidden_size) if needs[0] else 0)
    grad_topk_weights = grad_output.new_empty(0)
    if needs[1]:
        grad_topk_weights = topk_weights.new_empty(topk_weights.shape)
    if num_rows == 0 or not any(needs):
        return grad_input, grad_topk_weights
    rows = inverse_permutation(gather_indices) if scatter_indices is None else scatter_indices
    slots = next_power_of_2(top_k)
    # A program takes all slots of a token at once, so it reads the row of grad_output once.
    block_h = max(_BLOCK_BYTES // (input.itemsize * slots), 16)
    block_h = min(block_h, next_power_of_2(max(hidden_size, 1)))
    launch(
        _unpermute_bwd_kernel, (num_rows // top_k,),
        grad_output, input, rows.contiguous(), topk_weights, grad_input, grad_topk_weights,
        *grad_output.stride(), *input.stride(), *topk_weights.stride(),
        num_rows, hidden_size, top_k,
        SLOTS=slots, BLOCK_H=block_h, NEEDS_INPUT=needs[0], NEEDS_WEIGHTS=needs[1], num_warps=4,
        on=input,
    )  # fmt: skip
    return grad_input, grad_topk_weights
