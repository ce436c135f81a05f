# SPDX-License-Identifier: Apache-2.0
"""unpermute and its backward in PyTorch."""

from __future__ import annotations

import torch

from moe_ops._pytorch.rows import chunks, rows_of_slots, sum_slots, tokens_of_rows


def unpermute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    top_k: int = 1,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    return sum_slots(input, rows_of_slots(gather_indices, scatter_indices), topk_weights, top_k)


def unpermute_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    top_k: int,
    scatter_indices: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    accumulator = torch.promote_types(grad_output.dtype, torch.float32)
    num_rows = gather_indices.shape[0]
    tokens = tokens_of_rows(gather_indices, top_k)
    slots = gather_indices.clamp(0, max(num_rows - 1, 0))
    scale = topk_weights.reshape(-1, 1).index_select(0, slots).to(accumulator)
    grad_input = grad_output.new_empty(input.shape if needs[0] else 0)
    dots = grad_output.new_empty(num_rows if needs[1] else 0, dtype=accumulator)
    # A fp32 copy of all rows would be new memory each time.
    for part in chunks(num_rows, grad_output.shape[1]):
        grad_rows = grad_output.index_select(0, tokens[part]).to(accumulator)
        if needs[0]:
            torch.mul(grad_rows, scale[part], out=grad_input[part])
        if needs[1]:
            dots[part] = torch.linalg.vecdot(grad_rows, input[part].to(accumulator))
    if not needs[1]:
        return grad_input, grad_output.new_empty(0)
    by_slot = dots.index_select(0, rows_of_slots(gather_indices, scatter_indices))
    return grad_input, by_slot.reshape(topk_weights.shape).to(topk_weights.dtype)
