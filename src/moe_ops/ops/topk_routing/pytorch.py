# SPDX-License-Identifier: Apache-2.0
"""topk_routing and its backward in PyTorch.

T num_tokens, E num_experts, K top_k.
"""

from __future__ import annotations

import torch

# Keeps 0 / 0 out of the renormalisation, as DeepSeek-V3 has it; no other sum feels it in fp32.
_EPSILON = 1e-20


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
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    scores = _score(logits, score_function) if score_before_topk else logits
    choice = scores if selection_bias is None else scores + selection_bias
    if top_groups < num_groups:
        choice = _exclude_groups(choice, num_groups, top_groups, group_score)
    topk_ids = _topk(choice, top_k)
    weights = scores.gather(1, topk_ids)
    if not score_before_topk:
        weights = _score(weights, score_function)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
    if scaling_factor != 1.0:
        weights = weights * scaling_factor
    return weights, topk_ids.int()


def topk_routing_backward(
    grad_topk_weights: torch.Tensor,
    logits: torch.Tensor,
    topk_ids: torch.Tensor,
    score_function: str,
    score_before_topk: bool,
    renormalize: bool,
    scaling_factor: float,
) -> torch.Tensor:
    accumulator = torch.promote_types(logits.dtype, torch.float32)
    ids = topk_ids.clamp(0, max(logits.shape[1] - 1, 0)).long()
    if score_before_topk:
        scores = _score(logits.to(accumulator), score_function)
        weights = scores.gather(1, ids)
    else:
        weights = _score(logits.gather(1, ids).to(accumulator), score_function)
        scores = weights
    grad = grad_topk_weights.to(accumulator) * scaling_factor
    if renormalize:
        total = weights.sum(1, keepdim=True) + _EPSILON
        grad = (grad - (grad * weights).sum(1, keepdim=True) / total) / total
    if score_function == "sigmoid":
        grad_selected = grad * weights * (1 - weights)
    else:
        dot = (grad * weights).sum(1, keepdim=True)
        grad_selected = weights * (grad - dot)
        if score_before_topk:
            # softmax over all experts: the unselected feel the selected through its denominator.
            return (-scores * dot).scatter_(1, ids, grad_selected).to(logits.dtype)
    zeros = torch.zeros_like(logits, dtype=accumulator, memory_format=torch.contiguous_format)
    return zeros.scatter_(1, ids, grad_selected).to(logits.dtype)


def _score(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    return logits.softmax(1) if score_function == "softmax" else logits.sigmoid()


def _topk(choice: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ids of the top_k largest, in descending order, ties to the lower id (topk's are any)."""
    if choice.dtype == torch.float64:
        return choice.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    # No two of these integers are equal, so topk will do, at a third of a sort's time: the bits of a
    # float, the negative ones turned around, order as the float does; below them the id, reversed.
    # One zero and one NaN, which is above infinity.
    choice = torch.where(choice.isnan(), torch.nan, choice + 0.0)
    bits = choice.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    num_experts = choice.shape[1]
    reversed_ids = torch.arange(num_experts - 1, -1, -1, device=choice.device)
    keys = ordered * num_experts + reversed_ids
    return num_experts - 1 - keys.topk(top_k, dim=1).values.remainder(num_experts)


def _exclude_groups(
    choice: torch.Tensor, num_groups: int, top_groups: int, group_score: str
) -> torch.Tensor:
    """`choice` with -inf at the experts outside each token's `top_groups` best groups."""
    grouped = choice.unflatten(1, (num_groups, -1))
    if group_score == "max":
        scores = grouped.amax(2)
    else:
        scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    excluded = torch.ones_like(scores, dtype=torch.bool)
    excluded.scatter_(1, _topk(scores, top_groups), False)
    # An expert that is masked with -inf stays above those of excluded groups.
    kept = grouped.clamp(min=torch.finfo(choice.dtype).min)
    return kept.masked_fill(excluded[..., None], float("-inf")).flatten(1)
