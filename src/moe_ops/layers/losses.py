# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss that keeps experts evenly used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ops import topk_routing


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Compute how unevenly a router spreads its tokens over the experts.

        f[e] = slots of counted tokens that chose expert e / counted tokens
        P[e] = mean over counted tokens of softmax(router_logits)[e]
        loss = num_experts * sum_e f[e] * P[e]

    Each token chooses the top_k experts of highest logit, ties to the lower id. The tokens of
    several layers are counted together. Even use gives top_k, the collapse on top_k experts
    num_experts; no counted tokens give zero.

    Args:
        router_logits (Tensor (T, num_experts), floating, or a sequence of one for each layer): as
            MoE returns them.
        num_experts (int): number of experts.
        top_k (int): experts per token.
        attention_mask (Tensor, T elements in any shape, or None): tokens where it is zero are not
            counted, in any layer.

    Returns:
        loss (scalar, fp32, or fp64 for fp64 logits): not yet multiplied by a coefficient.

    Raises:
        ValueError: no logits, or logits or a mask of another size; top_k out of range (from
            moe::topk_routing).

    Differentiable in router_logits, through P; f is a constant. It holds (T, num_experts) and
    (T, top_k) tensors of one layer at a time, synchronises nothing, and the same inputs give the
    same bits.

    Source: Fedus et al., 2021 (arXiv:2101.03961), equations 4 to 6, with top_k choices in place of
    one.
    """
    layers = (router_logits,) if isinstance(router_logits, Tensor) else tuple(router_logits)
    _check(layers, num_experts, attention_mask)
    device = layers[0].device
    sums = [_layer_sums(logits, top_k, attention_mask) for logits in layers]
    slots, probabilities, num_tokens = (
        torch.stack([each.to(device) for each in values]).sum(0)
        for values in zip(*sums, strict=True)
    )
    num_tokens = num_tokens.clamp(min=1)
    f = slots.to(probabilities.dtype) / num_tokens
    return num_experts * (f * (probabilities / num_tokens)).sum()


def _layer_sums(
    logits: Tensor, top_k: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each expert's slots (E,), its summed probability (E,), and the number of tokens counted."""
    num_tokens, num_experts = logits.shape
    if attention_mask is None:
        counted = logits.new_ones(num_tokens, dtype=torch.long)
    else:
        counted = (attention_mask.reshape(-1).to(logits.device) != 0).long()
        # Before the softmax: padding may be NaN, in the backward too.
        logits = logits.masked_fill(counted[:, None] == 0, 0.0)
    probabilities = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    probabilities = probabilities * counted[:, None]
    _, topk_ids = topk_routing(logits.detach(), top_k)
    # Whole numbers: the order in which they are added up does not matter.
    slots = counted.new_zeros(num_experts).scatter_add_(
        0, topk_ids.long().flatten(), counted[:, None].expand(-1, top_k).flatten()
    )
    return slots, probabilities.sum(0), counted.sum()


def _check(layers: tuple[Tensor, ...], num_experts: int, attention_mask: Tensor | None) -> None:
    if not layers:
        raise ValueError(
            "moe_ops.layers.load_balancing_loss: expected router_logits of at least one layer, "
            "got none; pass what MoE returns"
        )
    for logits in layers:
        if logits.ndim != 2 or logits.shape[1] != num_experts:
            raise ValueError(
                "moe_ops.layers.load_balancing_loss: expected router_logits of shape "
                f"(num_tokens, num_experts ({num_experts})), got {tuple(logits.shape)}"
            )
        if attention_mask is not None and attention_mask.numel() != logits.shape[0]:
            raise ValueError(
                "moe_ops.layers.load_balancing_loss: expected attention_mask to have one element "
                f"per token ({logits.shape[0]}), got {attention_mask.numel()}"
            )
