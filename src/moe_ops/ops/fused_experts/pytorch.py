# SPDX-License-Identifier: Apache-2.0
"""fused_experts and its backward in PyTorch.

T num_tokens, H hidden_size, I intermediate_size, E experts, K top_k, R = T * K routed rows in
expert order, U = 2 * I where gated, else I.

x are hidden states, z pre-activations, h activations, y the experts' outputs; d... are gradients.
"""

from __future__ import annotations

from torch import Tensor

from moe_ops._pytorch.activation import Activation
from moe_ops._pytorch.dequantize import matrices
from moe_ops._pytorch.experts import Routing, activated, activated_backward, up_projection
from moe_ops._pytorch.products import Products
from moe_ops._pytorch.routing import routing_indices
from moe_ops._pytorch.rows import sum_slots, weights_of_rows
from moe_ops.quantization.stored import StoredWeight


def fused_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor | StoredWeight,
    down_proj: Tensor | StoredWeight,
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
    *,
    for_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and with for_backward what fused_experts_forward returns."""
    token_counts, gather_indices, scatter_indices = routing_indices(topk_ids, gate_up_proj.shape[0])
    routing = Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    weights = routing.without_dropped(topk_weights)
    before, after = (weights, None) if weights_before else (None, weights)
    act = Activation(activation, gated, interleaved, activation_limit)
    z = up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, before)
    h = activated(z, act, routing.products.tail)
    if recompute != "none" or not for_backward:
        z = z.new_empty(0)
    y = routing.products.multiply(h, matrices(down_proj, h.dtype).mT, down_bias)  # (R, H)
    output = sum_slots(y, routing.rows, after, routing.top_k)
    if not for_backward:
        return output
    return output, z, token_counts, gather_indices, scatter_indices


def fused_experts_down_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor | StoredWeight,
    down_proj: Tensor | StoredWeight,
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
) -> tuple[Tensor, ...]:
    need_dz, need_down, need_dots, need_bias = needs
    dz, grad_down, grad_weights, grad_bias = (grad_output.new_empty(0) for _ in needs)
    if not any(needs):
        return dz, grad_down, grad_weights, grad_bias

    routing = Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    products = routing.products
    weights = routing.without_dropped(topk_weights)
    after = None if weights_before else weights_of_rows(weights, gather_indices)  # (R, 1)
    dy = grad_output.index_select(0, routing.tokens)  # (R, H), without the weights
    if need_bias:
        grad_bias = products.sum_by_expert(dy if after is None else dy * after, dy.dtype)
    if not any(needs[:3]):
        return dz, grad_down, grad_weights, grad_bias

    act = Activation(activation, gated, interleaved, activation_limit)
    z = pre_activation
    if z is None:
        assert hidden_states is not None  # the schema's `where` says so
        before = weights if weights_before else None
        z = up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, before)
    dh = None
    if need_dz or need_dots:
        dh = products.multiply(dy, matrices(down_proj, dy.dtype))
    h, dz, dots = activated_backward(
        z, dh, after, act, products.tail, need_down, need_dz, need_dots
    )
    del z, dh
    if need_down:
        grad_down = _grad_weight(products, dy, h, transposed)
    if need_dots:
        by_slot = routing.by_slot(dots)
        if down_bias is not None:
            by_slot += routing.bias_dots(grad_output, down_bias)
        grad_weights = routing.without_dropped(by_slot).to(topk_weights.dtype)
    return dz, grad_down, grad_weights, grad_bias


def fused_experts_up_backward(
    grad_pre_activation: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor | StoredWeight,
    topk_weights: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    top_k: int,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[Tensor, ...]:
    need_x, need_up, need_dots, need_bias = needs
    dz = grad_pre_activation
    grad_x, grad_up, grad_weights, grad_bias = (dz.new_empty(0) for _ in needs)
    if not any(needs):
        return grad_x, grad_up, grad_weights, grad_bias

    routing = Routing(token_counts, gather_indices, scatter_indices, top_k)
    products = routing.products
    before = None if topk_weights is None else routing.without_dropped(topk_weights)
    if need_bias:
        grad_bias = products.sum_by_expert(dz, dz.dtype)
    if need_up:
        assert hidden_states is not None  # the schema's `where` says so
        x = routing.rows_of(hidden_states, before)
        grad_up = _grad_weight(products, dz, x, transposed)
        del x
    if need_x or need_dots:
        dx = products.multiply(dz, matrices(gate_up_proj, dz.dtype))  # (R, H)
        if need_x:
            grad_x = sum_slots(dx, routing.rows, before, top_k)
        if need_dots:
            assert hidden_states is not None
            assert topk_weights is not None
            by_slot = routing.by_slot(routing.dots_with_tokens(dx, hidden_states))
            grad_weights = routing.without_dropped(by_slot).to(topk_weights.dtype)
    return grad_x, grad_up, grad_weights, grad_bias


def _grad_weight(products: Products, dy: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """Return sum_i outer(dy[i], x[i]) over the rows of each expert, stored as the weight is."""
    if transposed:
        return products.multiply_transposed(x, dy, dy.dtype).mT
    return products.multiply_transposed(dy, x, dy.dtype)
