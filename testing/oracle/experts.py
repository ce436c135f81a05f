# SPDX-License-Identifier: Apache-2.0
"""Computes fused_experts and its activations, one row at a time.

T tokens, K top_k, R = T * K routed rows, E experts, H hidden size, I intermediate size,
U = 2 * I where gated, else I.
"""

import math
from collections.abc import Iterator
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


def up_projection(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    topk_weights: Tensor | None,
    gate_up_bias: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    top_k: int,
) -> Tensor:
    """Return z (R, U) of the rows in expert order, zero for rows that belong to no expert.

    topk_weights, if they are given, multiply the rows before the product.
    """
    x, gate_up_proj, topk_weights, gate_up_bias = to_fp64(
        hidden_states, gate_up_proj, topk_weights, gate_up_bias
    )
    found = [x.new_zeros(gate_up_proj.shape[1]) for _ in range(len(gather_indices))]
    for row, expert, token, choice in _used_rows(token_counts, gather_indices, top_k):
        own = x[token] if topk_weights is None else x[token] * topk_weights[token, choice]
        z = gate_up_proj[expert] @ own
        found[row] = z if gate_up_bias is None else z + gate_up_bias[expert]
    return torch.stack(found) if found else x.new_zeros(0, gate_up_proj.shape[1])


def down_projection(
    pre_activation: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    down_bias: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
) -> Tensor:
    """Return the output (T, H) of fused_experts, from z (R, U) in expert order."""
    z, down_proj, topk_weights, down_bias = to_fp64(
        pre_activation, down_proj, topk_weights, down_bias
    )
    hidden_size, top_k = down_proj.shape[1], topk_weights.shape[1]
    output = [z.new_zeros(hidden_size) for _ in range(topk_weights.shape[0])]
    for row, expert, token, choice in _used_rows(token_counts, gather_indices, top_k):
        h = activation_of(z[row], activation, gated, interleaved, activation_limit)
        y = down_proj[expert] @ h
        if down_bias is not None:
            y = y + down_bias[expert]
        weighted = y if weights_before else y * topk_weights[token, choice]
        output[token] = output[token] + weighted
    return torch.stack(output) if output else z.new_zeros(0, hidden_size)


def _used_rows(
    token_counts: Tensor, gather_indices: Tensor, top_k: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the row, expert, token and choice of each row that belongs to an expert."""
    row = 0
    for expert, count in enumerate(token_counts.tolist()):
        for _ in range(count):
            token, choice = divmod(int(gather_indices[row]), top_k)
            yield row, expert, token, choice
            row += 1


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
) -> tuple[Tensor, Tensor]:
    """Return output (T, H) and pre_activation (R, U), for a routing in expert order."""
    x, gate_up_proj, down_proj, topk_weights = to_fp64(
        hidden_states, gate_up_proj, down_proj, topk_weights
    )
    z = up_projection(
        x, gate_up_proj, topk_weights if weights_before else None, gate_up_bias, token_counts,
        gather_indices, topk_weights.shape[1],
    )  # fmt: skip
    output = down_projection(
        z, down_proj, topk_weights, down_bias, token_counts, gather_indices, activation, gated,
        interleaved, activation_limit, weights_before,
    )  # fmt: skip
    # Without rows it has still the autograd history of its inputs.
    history = x.sum() + gate_up_proj.sum() + down_proj.sum() + topk_weights.sum()
    return (output if len(output) else history * output), z


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


def fused_experts_down_backward(
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
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    # Where one of these is None, no gradient asked for depends on it.
    x = torch.zeros_like(grad_output) if hidden_states is None else hidden_states
    bias = down_bias
    if bias is None:
        bias = grad_output.new_zeros(down_proj.shape[:2])
    flags = (activation, gated, interleaved, activation_limit, weights_before)
    if pre_activation is None:
        _, pre_activation = expert_layer(
            x, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, token_counts,
            gather_indices, *flags,
        )  # fmt: skip

    def from_pre_activation(
        pre_activation: Tensor, down_proj: Tensor, topk_weights: Tensor, down_bias: Tensor
    ) -> Tensor:
        return down_projection(
            pre_activation, down_proj, topk_weights, down_bias, token_counts, gather_indices, *flags
        )

    arguments = {
        "pre_activation": pre_activation,
        "down_proj": down_proj,
        "topk_weights": topk_weights,
        "down_bias": bias,
    }
    return needed_gradients(from_pre_activation, arguments, list(arguments), grad_output, needs)


def fused_experts_up_backward(
    grad_pre_activation: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor,
    topk_weights: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    top_k: int,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    num_rows, hidden_size = grad_pre_activation.shape[0], gate_up_proj.shape[2]
    x = hidden_states
    if x is None:
        # No gradient asked for depends on it.
        x = grad_pre_activation.new_zeros(num_rows // top_k, hidden_size)

    def from_input(
        hidden_states: Tensor,
        gate_up_proj: Tensor,
        gate_up_bias: Tensor,
        topk_weights: Tensor | None = None,
    ) -> Tensor:
        return up_projection(
            hidden_states, gate_up_proj, topk_weights, gate_up_bias, token_counts, gather_indices,
            top_k,
        )  # fmt: skip

    arguments = {
        "hidden_states": x,
        "gate_up_proj": gate_up_proj,
        "topk_weights": topk_weights,
        "gate_up_bias": grad_pre_activation.new_zeros(gate_up_proj.shape[:2]),
    }
    # Rows that belong to no expert may hold anything, NaN too: there is no z of theirs.
    tangent = grad_pre_activation.clone()
    tangent[int(token_counts.sum()) :] = 0
    return needed_gradients(from_input, arguments, list(arguments), tangent, needs)


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Return each expert's weight with its adapter in it, (E, N, D)."""
    weight, lora_a, lora_b = to_fp64(weight, lora_a, lora_b)
    found = [w + b @ a for w, a, b in zip(weight, lora_a, lora_b, strict=True)]
    return torch.stack(found)


def fused_experts_lora_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_lora_a: Tensor,
    gate_up_lora_b: Tensor,
    down_lora_a: Tensor,
    down_lora_b: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    kernel_config: str | None = None,
) -> tuple[Any, ...]:
    """Return what fused_experts_forward does with the adapters merged, and the thin products."""
    flags = (activation, gated, interleaved, activation_limit)
    output, z, counts, gather, scatter = fused_experts_forward(
        hidden_states,
        merged(gate_up_proj, gate_up_lora_a, gate_up_lora_b),
        merged(down_proj, down_lora_a, down_lora_b),
        topk_ids, topk_weights, gate_up_bias, down_bias, *flags,
    )  # fmt: skip
    x, up_a, down_a = to_fp64(hidden_states, gate_up_lora_a, down_lora_a)
    of_up, of_down = (
        x.new_zeros(len(gather), up_a.shape[1]),
        x.new_zeros(len(gather), down_a.shape[1]),
    )
    for row, expert, token, _ in _used_rows(counts, gather, topk_ids.shape[1]):
        h = activation_of(z[row].detach(), *flags)
        of_up[row] = (up_a[expert] @ x[token]).detach()
        of_down[row] = (down_a[expert] @ h).detach()
    return output, z, of_up, of_down, counts, gather, scatter


def fused_experts_lora(*args: Any, **kwargs: Any) -> Tensor:
    """Return the output (T, H) of fused_experts_lora_forward, whose arguments it takes."""
    return fused_experts_lora_forward(*args, **kwargs)[0]


def fused_experts_lora_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    gate_up_lora_a: Tensor,
    gate_up_lora_b: Tensor,
    down_lora_a: Tensor,
    down_lora_b: Tensor,
    down_bias: Tensor | None,
    pre_activation: Tensor,
    gate_up_low_rank: Tensor | None,
    down_low_rank: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[Tensor | None, ...]:
    top_k = topk_weights.shape[1]
    flags = (activation, gated, interleaved, activation_limit, False)
    need_x, need_weights, need_up_a, need_up_b, need_down_a, need_down_b = needs

    # What is given of the forward stands for itself: no gradient goes through how it was made.
    def from_pre_activation(
        pre_activation: Tensor, topk_weights: Tensor, down_lora_a: Tensor
    ) -> Tensor:
        weight = merged(down_proj, down_lora_a, down_lora_b)
        return down_projection(
            pre_activation, weight, topk_weights, down_bias, token_counts, gather_indices, *flags
        )

    arguments = {
        "pre_activation": pre_activation, "topk_weights": topk_weights, "down_lora_a": down_lora_a,
    }  # fmt: skip
    dz, grad_weights, grad_down_a = needed_gradients(
        from_pre_activation, arguments, list(arguments), grad_output,
        [True, need_weights, need_down_a],
    )  # fmt: skip
    assert dz is not None

    def from_input(hidden_states: Tensor, gate_up_lora_a: Tensor) -> Tensor:
        weight = merged(gate_up_proj, gate_up_lora_a, gate_up_lora_b)
        return up_projection(hidden_states, weight, None, None, token_counts, gather_indices, top_k)

    x = torch.zeros_like(grad_output) if hidden_states is None else hidden_states
    arguments = {"hidden_states": x, "gate_up_lora_a": gate_up_lora_a}
    grad_x, grad_up_a = needed_gradients(
        from_input, arguments, list(arguments), dz, [need_x, need_up_a]
    )
    grad_up_b = grad_down_b = None
    dy, s = to_fp64(grad_output, topk_weights)
    if need_up_b:
        assert gate_up_low_rank is not None
        grad_up_b = torch.zeros_like(gate_up_lora_b, dtype=torch.float64)
    if need_down_b:
        assert down_low_rank is not None
        grad_down_b = torch.zeros_like(down_lora_b, dtype=torch.float64)
    for row, expert, token, choice in _used_rows(token_counts, gather_indices, top_k):
        if grad_up_b is not None and gate_up_low_rank is not None:
            grad_up_b[expert] += torch.outer(dz[row], gate_up_low_rank[row].double())
        if grad_down_b is not None and down_low_rank is not None:
            grad_down_b[expert] += torch.outer(
                dy[token], s[token, choice] * down_low_rank[row].double()
            )
    return grad_x, grad_weights, grad_up_a, grad_up_b, grad_down_a, grad_down_b
