# SPDX-License-Identifier: Apache-2.0
"""Run routing_indices in Triton: allocate, and launch the sort or its passes."""

from __future__ import annotations

import torch

from moe_ops._triton.kernels.routing import (
    _routing_indices_count_kernel,
    _routing_indices_place_kernel,
    _routing_indices_sort_kernel,
)
from moe_ops._triton.launch import cdiv, follows, launch, next_power_of_2

# A program, on 4 warps, sorts this many slots at a time.
_BLOCK = 512
# One warp sorts so many at most, by shuffles alone.
_FEW = 64
# Enough programs to fill a GPU, and so few that each can read the counts of all.
_MAX_CHUNKS = 256
# A program reads this many counts at a time.
_COUNTS = 16384


def routing_indices(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, top_k = topk_ids.shape
    num_slots = num_tokens * top_k
    gather_indices = torch.empty(num_slots, dtype=torch.int32, device=topk_ids.device)
    scatter_indices = torch.empty_like(gather_indices)
    token_counts = torch.empty(num_experts, dtype=torch.int32, device=topk_ids.device)
    if num_slots == 0:
        return token_counts.zero_(), gather_indices, scatter_indices
    experts = max(2, next_power_of_2(num_experts))
    sizes = (*topk_ids.stride(), num_slots, top_k, num_experts)
    if num_slots <= _BLOCK:
        few = num_slots <= _FEW
        launch(
            _routing_indices_sort_kernel, (1,),
            topk_ids, token_counts, gather_indices, scatter_indices, *sizes,
            BLOCK=_FEW if few else _BLOCK, EXPERTS=experts, num_warps=1 if few else 4,
            **follows(topk_ids, num_slots),
            on=topk_ids,
        )  # fmt: skip
        return token_counts, gather_indices, scatter_indices
    num_blocks = cdiv(num_slots, _BLOCK * _MAX_CHUNKS)
    num_chunks = cdiv(num_slots, _BLOCK * num_blocks)
    counts = torch.empty(num_chunks, experts, dtype=torch.int32, device=topk_ids.device)
    launch(
        _routing_indices_count_kernel, (num_chunks,),
        topk_ids, counts, *sizes, num_blocks, BLOCK=_BLOCK, EXPERTS=experts,
        on=topk_ids,
    )  # fmt: skip
    launch(
        _routing_indices_place_kernel, (num_chunks,),
        topk_ids, counts, token_counts, gather_indices, scatter_indices, *sizes,
        num_blocks, num_chunks,
        BLOCK=_BLOCK, EXPERTS=experts, CHUNKS=max(1, _COUNTS // experts),
        on=topk_ids,
    )  # fmt: skip
    return token_counts, gather_indices, scatter_indices
