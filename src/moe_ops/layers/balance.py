# SPDX-License-Identifier: Apache-2.0
"""Even use of the experts without a loss: what the counts say, and the bias that they move."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from moe_ops._core.checks import dtype_name


@torch.no_grad()
def update_selection_bias_(
    selection_bias: Tensor,
    token_counts: Tensor,
    rate: float,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Move a selection bias towards experts that got fewer tokens than the mean, in place.

        token_counts      = sum over ranks of token_counts
        selection_bias[e] = selection_bias[e] + rate * sign(mean(token_counts) - token_counts[e])

    Call it once per optimizer step, with the counts of all its batches. Router.token_counts has
    them; so do moe::routing_indices, and any count of the topk_ids that were chosen.

    Args:
        selection_bias (Tensor (num_experts,), fp32 or fp64): a buffer such as Router's
            e_score_correction_bias. It changes in place, without a gradient.
        token_counts (Tensor (num_experts,), integer): tokens that each expert got.
        rate (float): size of a step; DeepSeek-V3 has 1e-3.
        group (ProcessGroup or None): ranks whose counts are added up: each calls this, and each
            bias makes the same step. None takes the counts as they are;
            torch.distributed.group.WORLD is all ranks.

    Returns:
        selection_bias (Tensor): the same tensor.

    Raises:
        ValueError: token_counts of another shape than selection_bias, or more than one dimension.
        TypeError: a bias in another dtype: in fp16 or bf16 small steps get lost; or counts that are
            no integers.

    The sign is exact. It synchronises nothing with the host, and compiles with fullgraph=True, the
    all-reduce included.

    Source: Wang et al., 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437).
    """
    _check(selection_bias, token_counts)
    counts = token_counts.to(selection_bias.device, torch.long, copy=True)
    if group is not None:
        distributed.all_reduce(counts, group=group)
    # num_experts * (mean - counts), in whole numbers.
    direction = (counts.sum() - counts * counts.numel()).sign()
    return selection_bias.add_(direction.to(selection_bias.dtype), alpha=rate)


def load_balance_metrics(token_counts: Tensor) -> dict[str, Tensor]:
    """Compute how evenly the experts of a layer were used.

        max_over_mean = max_e token_counts[e] / mean_e token_counts[e]
        dead_experts  = number of experts that got no token
        entropy       = -sum_e p[e] * log(p[e]),  p = token_counts / sum(token_counts)

    Args:
        token_counts (Tensor (..., num_experts), any dtype): tokens that each expert got.

    Returns:
        metrics (dict of Tensor (...), fp64): max_over_mean, from 1 (even) to num_experts;
            dead_experts; entropy in nats, from 0 (one expert) to log(num_experts) (even). Without
            tokens all are even and dead: 1, num_experts, and log(num_experts).

    Raises:
        ValueError: token_counts without an expert.

    Not differentiable. It synchronises nothing with the host.
    """
    counts = token_counts.detach().double()
    if counts.ndim == 0 or counts.shape[-1] == 0:
        raise ValueError(
            "moe_ops.layers.load_balance_metrics: expected token_counts of shape (..., num_experts) "
            f"with an expert, got {tuple(counts.shape)}"
        )
    num_experts = counts.shape[-1]
    total = counts.sum(-1, keepdim=True)
    shares = torch.where(total > 0, counts / total.clamp(min=1), 1 / num_experts)
    return {
        "max_over_mean": shares.amax(-1) * num_experts,
        "dead_experts": (counts == 0).sum(-1).double(),
        "entropy": torch.special.entr(shares).sum(-1),
    }


def _check(selection_bias: Tensor, token_counts: Tensor) -> None:
    name = "moe_ops.layers.update_selection_bias_"
    if selection_bias.ndim != 1 or token_counts.shape != selection_bias.shape:
        raise ValueError(
            f"{name}: expected selection_bias and token_counts of one shape (num_experts,), got "
            f"{tuple(selection_bias.shape)} and {tuple(token_counts.shape)}"
        )
    if selection_bias.dtype not in (torch.float32, torch.float64):
        advice = (
            ", where small steps get lost; keep it in float32 after model.to(dtype): "
            "router.e_score_correction_bias = router.e_score_correction_bias.float()"
        )
        raise TypeError(
            f"{name}: expected selection_bias in float32 or float64, got "
            f"{dtype_name(selection_bias.dtype)}{advice * selection_bias.is_floating_point()}"
        )
    if token_counts.is_floating_point() or token_counts.is_complex():
        raise TypeError(
            f"{name}: expected token_counts of integers, got {dtype_name(token_counts.dtype)}; "
            "pass token_counts.long()"
        )
