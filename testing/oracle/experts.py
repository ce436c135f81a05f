# SPDX-License-Identifier: Apache-2.0
"""Computes fused_experts and its activations, one row at a time.

T tokens, K top_k, R = T * K routed rows, E experts, H hidden size, I intermediate size,
U = 2 * I where gated, else I.
"""

import math
from typing import Any

import torch
from torch import Tensor

from testing.oracle.differentiate import needed_gradients, to_fp64
from testing.oracle.routing import routing_indices


def activated(gate: Tensor, activation: str) -> Tensor:
    """Return the activation of gate. For swiglu_oai this is the factor of up + 1."""
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    if activation == "gelu_tanh":
        return gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    if activation == "relu":
        return torch.relu(gate)
    if activation == "relu_squared":
        return torch.relu(gate) ** 2
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(1.702 * gate)
    raise ValueError(f"unknown activation {activation!r}")


def activation_of(
    z: Tensor, activation: str, gated: bool, interleaved: bool, activation_limit: float | None
) -> Tensor:
    """Return one row's input (I,) of the down projection, from its pre-activation z (U,)."""
    if not gated:
        return activated(limited(z, None, activation_limit), activation)
    half = z.shape[0] // 2
    gate, up = (z[0::2], z[1::2]) if interleaved else (z[:half], z[half:])
    gate = limited(gate, None, activation_limit)
    up = limited(up, activation_limit, activation_limit)
    return activated(gate, activation) * (up + 1 if activation == "swiglu_oai" else up)


def limited(values: Tensor, below: float | None, above: float | None) -> Tensor:
    """Return values limited to [-below, above]. A value exactly at a limit has its gradient."""
    if above is not None:
        values = torch.where(values > above, above, values)
    return values if below is None else torch.where(values < -below, -below, values)


def expert_layer(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
    pre_activation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output (T, H) and pre_activation (R, U), for a routing in expert order.

    A given pre_activation replaces the values of the computed one, not its derivative.
    """
    x, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, given = to_fp64(
        hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias,
        pre_activation,
    )  # fmt: skip
    top_k = topk_weights.shape[1]
    output = [x.new_zeros(x.shape[1]) for _ in range(x.shape[0])]
    pre_activations = [x.new_zeros(gate_up_proj.shape[1]) for _ in range(topk_weights.numel())]
    row = 0
    for expert, count in enumerate(token_counts.tolist()):
        for _ in range(count):
            slot = int(gather_indices[row])
            token, choice = slot // top_k, slot % top_k
            weight = topk_weights[token, choice]
            z = gate_up_proj[expert] @ (x[token] * weight if weights_before else x[token])
            if gate_up_bias is not None:
                z = z + gate_up_bias[expert]
            if given is not None:
                z = given[row] + (z - z.detach())
            h = activation_of(z, activation, gated, interleaved, activation_limit)
            y = down_proj[expert] @ h
            if down_bias is not None:
                y = y + down_bias[expert]
            output[token] = output[token] + (y if weights_before else y * weight)
            pre_activations[row] = z
            row += 1
    if not output:
        # It has no rows, but the autograd history of its inputs.
        history = x.sum() + gate_up_proj.sum() + down_proj.sum() + topk_weights.sum()
        return history * x.new_zeros(0, x.shape[1]), x.new_zeros(0, gate_up_proj.shape[1])
    return torch.stack(output), torch.stack(pre_activations)


def fused_experts_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    recompute: str = "none",
    kernel_config: str | None = None,
) -> tuple[Any, ...]:
    """Return output, pre_activation (None where recomputed), and the three of routing_indices."""
    counts, gather, scatter = routing_indices(topk_ids, gate_up_proj.shape[0])
    output, pre_activation = expert_layer(
        hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, counts,
        gather, activation, gated, interleaved, activation_limit, weights_before,
    )  # fmt: skip
    return output, pre_activation if recompute == "none" else None, counts, gather, scatter


def fused_experts(*args: Any, **kwargs: Any) -> Tensor:
    """Return the output (T, H) of fused_experts_forward, whose arguments it takes."""
    return fused_experts_forward(*args, **kwargs)[0]


def fused_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre_activation: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
    needs: list[bool],
    transposed: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    # Where one of these is None, no gradient asked for depends on it.
    biases = (
        grad_output.new_zeros(gate_up_proj.shape[:2]),
        grad_output.new_zeros(down_proj.shape[:2]),
    )
    arguments = {
        "hidden_states": torch.zeros_like(grad_output) if hidden_states is None else hidden_states,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "topk_weights": topk_weights,
        "gate_up_bias": biases[0] if gate_up_bias is None else gate_up_bias,
        "down_bias": biases[1] if down_bias is None else down_bias,
        "pre_activation": pre_activation,
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "activation_limit": activation_limit,
        "weights_before": weights_before,
    }
    names = [
        "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias",
    ]  # fmt: skip
    return needed_gradients(expert_layer, arguments, names, grad_output, needs)
