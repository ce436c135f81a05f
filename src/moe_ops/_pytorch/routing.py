# SPDX-License-Identifier: Apache-2.0
"""routing_indices in PyTorch."""

from __future__ import annotations

import torch


def routing_indices(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = topk_ids.reshape(-1)
    # Dropped ids become one more expert, behind the others.
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    gather_indices = torch.sort(keys, stable=True).indices
    token_counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts].int()
    rows = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    scatter_indices = torch.empty_like(rows).scatter_(0, gather_indices, rows)
    return token_counts, gather_indices.int(), scatter_indices
