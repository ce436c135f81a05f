# SPDX-License-Identifier: Apache-2.0
"""Run topk_routing and its backward in Triton: allocate, and launch their kernels."""

from __future__ import annotations

import torch

from moe_ops._triton.launch import cdiv, launch, next_power_of_2
from moe_ops.ops.topk_routing.kernels import _topk_routing_bwd_kernel, _topk_routing_fwd_kernel

# A program holds this many elements of logits.
_TILE = 2048


def topk_routing(
    logits: torch.Tensor,
    top_k: int,
    selection_bias: torch.Tensor | None = None,
    score_function: str = "softmax",
    score_before_topk: bool = True,
    renormalize: bool = False,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2_sum",
    scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    device = logits.device
    topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    if num_tokens == 0:
        return topk_weights, topk_ids
    group_size = num_experts // num_groups
    groups, size = next_power_of_2(num_groups), next_power_of_2(group_size)
    block_t = max(1, _TILE // (groups * size))
    launch(
        _topk_routing_fwd_kernel, (cdiv(num_tokens, block_t),),
        logits, selection_bias, topk_weights, topk_ids,
        *logits.stride(), selection_bias.stride(0) if selection_bias is not None else 0,
        num_tokens, scaling_factor,
        TOP_K=top_k, NUM_GROUPS=num_groups, GROUP_SIZE=group_size, TOP_GROUPS=top_groups,
        TOP2_SUM=group_score == "top2_sum", SOFTMAX=score_function == "softmax",
        SCORE_BEFORE=score_before_topk, RENORMALIZE=renormalize,
        HAS_BIAS=selection_bias is not None,
        BLOCK_T=block_t, GROUPS=groups, SIZE=size, SLOTS=next_power_of_2(top_k),
        on=logits,
    )  # fmt: skip
    return topk_weights, topk_ids


def topk_routing_backward(
    grad_topk_weights: torch.Tensor,
    logits: torch.Tensor,
    topk_ids: torch.Tensor,
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> torch.Tensor:
    num_tokens, num_experts = logits.shape
    grad_logits = logits.new_empty(num_tokens, num_experts)
    if grad_logits.numel() == 0:
        return grad_logits
    top_k = topk_ids.shape[1]
    experts = next_power_of_2(num_experts)
    block_t = max(1, _TILE // experts)
    launch(
        _topk_routing_bwd_kernel, (cdiv(num_tokens, block_t),),
        grad_topk_weights, logits, topk_ids, grad_logits,
        *grad_topk_weights.stride(), *logits.stride(), *topk_ids.stride(),
        num_tokens, num_experts, scaling_factor,
        TOP_K=top_k, SOFTMAX=score_function == "softmax", SCORE_BEFORE=score_before_topk,
        RENORMALIZE=renormalize, BLOCK_T=block_t, EXPERTS=experts,
        SLOTS=next_power_of_2(max(top_k, 1)),
        on=logits,
    )  # fmt: skip
    return grad_logits
