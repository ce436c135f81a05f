# SPDX-License-Identifier: Apache-2.0
"""unpermute and its backward in PyTorch."""

from __future__ import annotations

import torch

from moe_ops.ops.rows import rows_of_slots, sum_slots, tokens_of_rows


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
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    tokens = tokens_of_rows(gather_indices, top_k)
    grad_rows = grad_output.index_select(0, tokens).to(accumulator)
    if needs[1]:
        dots = torch.linalg.vecdot(grad_rows, input.to(accumulator))
        by_slot = dots.index_select(0, rows_of_slots(gather_indices, scatter_indices))
        grad_topk_weights = by_slot.reshape(topk_weights.shape).to(topk_weights.dtype)
    if needs[0]:
        slots = gather_indices.clamp(0, max(gather_indices.shape[0] - 1, 0))
        scale = topk_weights.reshape(-1).index_select(0, slots).to(accumulator)
        grad_input = grad_rows.mul_(scale[:, None]).to(grad_output.dtype)
    return grad_input, grad_topk_weights
