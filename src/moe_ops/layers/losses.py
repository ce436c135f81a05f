# SPDX-License-Identifier: Apache-2.0
"""The auxiliary losses of a router: even use of the experts, and small logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from moe_ops import topk_routing
from moe_ops._core.checks import check_at_least


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
    group: distributed.ProcessGroup | None = None,
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
        group (ProcessGroup or None): ranks whose tokens are counted together: each calls this, with
            any number of tokens. Each gets the loss of all tokens and the gradient of its own
            logits, so a parameter's gradient is the sum over the ranks. Where it is their mean (DDP,
            FSDP), multiply the loss by the size of the group.

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
    layers = _layers("load_balancing_loss", router_logits, attention_mask, num_experts)
    device = layers[0].device
    sums = [_layer_sums(logits, top_k, attention_mask) for logits in layers]
    slots, probabilities, num_tokens = (
        torch.stack([each.to(device) for each in values]).sum(0)
        for values in zip(*sums, strict=True)
    )
    if group is not None:
        slots, probabilities, num_tokens = _over_ranks(slots, probabilities, num_tokens, group)
    num_tokens = num_tokens.clamp(min=1)
    f = slots.to(probabilities.dtype) / num_tokens
    return num_experts * (f * (probabilities / num_tokens)).sum()


def router_z_loss(
    router_logits: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Compute how large a router's logits are.

        loss = mean over counted tokens of logsumexp(router_logits)^2

    The tokens of several layers are counted together. No counted tokens give zero.

    Args:
        router_logits (Tensor (T, num_experts), floating, or a sequence of one for each layer): as
            MoE returns them.
        attention_mask (Tensor, T elements in any shape, or None): tokens where it is zero are not
            counted, in any layer.

    Returns:
        loss (scalar, fp32, or fp64 for fp64 logits): not yet multiplied by a coefficient; ST-MoE
            has 1e-3.

    Raises:
        ValueError: no logits, or logits or a mask of another size.

    Differentiable in router_logits. It synchronises nothing, and the same inputs give the same
    bits.

    Source: Zoph et al., 2022, ST-MoE (arXiv:2202.08906), equation 5.
    """
    layers = _layers("router_z_loss", router_logits, attention_mask)
    device = layers[0].device
    sums, numbers = [], []
    for each in layers:
        logits, counted = _counted(each, attention_mask)
        # Padding has logits of zero here: it would add log(num_experts)^2.
        sums.append((logits.logsumexp(1).square() * counted).sum().to(device))
        numbers.append(counted.sum().to(device))
    return torch.stack(sums).sum() / torch.stack(numbers).sum().clamp(min=1)


def sequence_balance_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_sequences: int,
    top_k: int,
    attention_mask: Tensor | None = None,
    score_function: str = "sigmoid",
) -> Tensor:
    """Compute how unevenly a router spreads the tokens of each sequence over the experts.

        scores[t, e]  = score_function(router_logits)[t, e]
        f[e]          = num_experts / (top_k * T) * number of tokens that chose expert e
        P[e]          = 1 / T * sum_t scores[t, e] / sum_j scores[t, j]
        loss          = mean over sequences and layers of sum_e f[e] * P[e]

    T is the sequence's number of counted tokens. Each token chooses the top_k experts of highest
    score, ties to the lower id: neither a selection bias nor groups have a say, as in the paper.
    Even use gives 1, the collapse on top_k experts num_experts / top_k. A sequence without counted
    tokens is left out of the mean; without any sequence the loss is zero.

    Args:
        router_logits (Tensor (N, num_experts), floating, or a sequence of one for each layer): as
            MoE returns them for hidden states (num_sequences, length, hidden_size); N is
            num_sequences * length.
        num_sequences (int): number of sequences, all of one length with their padding.
        top_k (int): experts per token.
        attention_mask (Tensor, one element per token in any shape, or None): tokens where it is
            zero are not counted, in any layer.
        score_function (str): "sigmoid" (DeepSeek-V3) or "softmax".

    Returns:
        loss (scalar, fp32, or fp64 for fp64 logits): not yet multiplied by a coefficient;
            DeepSeek-V3 has 1e-4.

    Raises:
        ValueError: no logits, logits or a mask of another size, no sequence, or a number of tokens
            that is no multiple of num_sequences; top_k or score_function out of range (from
            moe::topk_routing).
        TypeError: num_sequences that is no int.

    Differentiable in router_logits, through P; f is a constant. It synchronises nothing, and the
    same inputs give the same bits.

    Source: DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20.
    """
    check_at_least("moe_ops.layers.sequence_balance_loss", 1, num_sequences=num_sequences)
    layers = _layers("sequence_balance_loss", router_logits, attention_mask)
    device = layers[0].device
    sums = []
    for logits in layers:
        if logits.shape[0] % num_sequences:
            raise ValueError(
                "moe_ops.layers.sequence_balance_loss: expected a number of tokens that is a "
                f"multiple of num_sequences ({num_sequences}), got {logits.shape[0]}; pad the "
                "sequences to one length and pass attention_mask"
            )
        losses, is_counted = _sequence_losses(
            logits, num_sequences, top_k, attention_mask, score_function
        )
        sums.append(torch.stack([losses.sum(), is_counted.sum().to(losses.dtype)]).to(device))
    loss, number = torch.stack(sums).sum(0)
    return loss / number.clamp(min=1)


def _sequence_losses(
    logits: Tensor,
    num_sequences: int,
    top_k: int,
    attention_mask: Tensor | None,
    score_function: str,
) -> tuple[Tensor, Tensor]:
    """Return each sequence's loss, zero without counted tokens, and whether it has any."""
    num_experts = logits.shape[1]
    logits, counted = _counted(logits, attention_mask)
    _, topk_ids = topk_routing(logits.detach(), top_k, score_function=score_function)
    # softmax(log(scores)) is scores / sum(scores), and no score underflows to 0 / 0.
    log_scores = F.logsigmoid(logits) if score_function == "sigmoid" else logits
    probabilities = log_scores.softmax(1) * counted[:, None]
    length = logits.shape[0] // num_sequences
    numbers = counted.view(num_sequences, length).sum(1)
    slots = counted.new_zeros(num_sequences, num_experts).scatter_add_(
        1,
        topk_ids.long().view(num_sequences, length * top_k),
        counted.repeat_interleave(top_k).view(num_sequences, length * top_k),
    )
    at_least_one = numbers.clamp(min=1)[:, None]
    f = slots.to(probabilities.dtype) * num_experts / (top_k * at_least_one)
    p = probabilities.view(num_sequences, length, num_experts).sum(1) / at_least_one
    return (f * p).sum(1), numbers > 0


def _layer_sums(
    logits: Tensor, top_k: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each expert's slots (E,), its summed probability (E,), and the number of tokens counted."""
    num_experts = logits.shape[1]
    logits, counted = _counted(logits, attention_mask)
    probabilities = logits.softmax(1) * counted[:, None]
    _, topk_ids = topk_routing(logits.detach(), top_k)
    # Whole numbers: the order in which they are added up does not matter.
    slots = counted.new_zeros(num_experts).scatter_add_(
        0, topk_ids.long().flatten(), counted[:, None].expand(-1, top_k).flatten()
    )
    return slots, probabilities.sum(0), counted.sum()


def _over_ranks(
    slots: Tensor, probabilities: Tensor, num_tokens: Tensor, group: distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up over the ranks. The gradient is that of this rank's terms."""
    numbers = torch.cat([slots, num_tokens.view(1)])
    total = probabilities.detach().clone()
    distributed.all_reduce(numbers, group=group)
    distributed.all_reduce(total, group=group)
    # x - x.detach() is an exact zero with the gradient of x.
    return numbers[:-1], total + (probabilities - probabilities.detach()), numbers[-1]


def _counted(logits: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits in fp32 (fp64 for fp64), zero for padding, and 1 for each counted token."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if attention_mask is None:
        return logits, logits.new_ones(logits.shape[0], dtype=torch.long)
    counted = (attention_mask.reshape(-1).to(logits.device) != 0).long()
    # Before any function of them: padding may be NaN, in the backward too.
    return logits.masked_fill(counted[:, None] == 0, 0.0), counted


def _layers(
    function: str,
    router_logits: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    num_experts: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the logits of each layer, checked."""
    layers = (router_logits,) if isinstance(router_logits, Tensor) else tuple(router_logits or ())
    if not layers:
        raise ValueError(
            f"moe_ops.layers.{function}: expected router_logits of at least one layer, "
            "got none; pass what MoE returns, or what a model does with output_router_logits=True"
        )
    for logits in layers:
        # A model whose output has None for a layer without experts gets this error too.
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 2 or shape[1] != (num_experts or shape[1]):
            wanted = "num_experts" if num_experts is None else f"num_experts ({num_experts})"
            raise ValueError(
                f"moe_ops.layers.{function}: expected router_logits of shape "
                f"(num_tokens, {wanted}), got {shape or logits}"
            )
        if attention_mask is not None and attention_mask.numel() != logits.shape[0]:
            raise ValueError(
                f"moe_ops.layers.{function}: expected attention_mask to have one element "
                f"per token ({logits.shape[0]}), got {attention_mask.numel()}"
            )
    return layers
