# SPDX-License-Identifier: Apache-2.0
"""fused_experts_lora and its backward in PyTorch. _pytorch/experts.py explains the letters.

low are an adapter's first thin products, (R, rank).
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


def fused_experts_lora(
    hidden_states: Tensor,
    gate_up_proj: Tensor | StoredWeight,
    down_proj: Tensor | StoredWeight,
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
    *,
    for_backward: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Return the output, and with for_backward what fused_experts_lora_forward returns."""
    token_counts, gather_indices, scatter_indices = routing_indices(topk_ids, gate_up_proj.shape[0])
    routing = Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    products = routing.products
    act = Activation(activation, gated, interleaved, activation_limit)
    z = up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, None)
    low_up = _add_adapter(
        products, z, hidden_states, gate_up_lora_a.mT, gate_up_lora_b.mT, routing.tokens
    )
    h = activated(z, act, products.tail)
    y = products.multiply(h, matrices(down_proj, h.dtype).mT, down_bias)  # (R, H)
    low_down = _add_adapter(products, y, h, down_lora_a.mT, down_lora_b.mT)
    output = sum_slots(y, routing.rows, routing.without_dropped(topk_weights), routing.top_k)
    if not for_backward:
        return output
    return output, z, low_up, low_down, token_counts, gather_indices, scatter_indices


def fused_experts_lora_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
    gate_up_proj: Tensor | StoredWeight,
    down_proj: Tensor | StoredWeight,
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
) -> tuple[Tensor, ...]:
    grads = [grad_output.new_empty(0) for _ in needs]
    need_x, need_weights, need_up_a, need_up_b, need_down_a, need_down_b = needs
    need_dz = need_x or need_up_a or need_up_b
    routing = Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    products, dtype = routing.products, grad_output.dtype
    scale = weights_of_rows(routing.without_dropped(topk_weights), gather_indices)  # (R, 1)
    dy = grad_output.index_select(0, routing.tokens)  # (R, H), without the weights
    if need_down_b:
        assert down_low_rank is not None  # the schema's `where` says so
        grads[5] = products.multiply_transposed(dy, (down_low_rank * scale).to(dtype), dtype)

    dz = None
    if need_dz or need_weights or need_down_a:
        dh = None
        if need_dz or need_weights:
            dh = products.multiply(dy, matrices(down_proj, dtype))
        low_down = _add_adapter(products, dh, dy, down_lora_b, down_lora_a)
        act = Activation(activation, gated, interleaved, activation_limit)
        h, dz, dots = activated_backward(
            pre_activation, dh, scale, act, products.tail, need_down_a, need_dz, need_weights
        )
        if need_down_a:
            grads[4] = products.multiply_transposed(low_down, h, dtype)
        if need_weights:
            by_slot = routing.by_slot(dots)
            if down_bias is not None:
                by_slot += routing.bias_dots(grad_output, down_bias)
            grads[1] = routing.without_dropped(by_slot).to(topk_weights.dtype)
        del dh, h
    if dz is None or not need_dz:
        return tuple(grads)

    dx = products.multiply(dz, matrices(gate_up_proj, dtype)) if need_x else None  # (R, H)
    if need_x or need_up_a:
        low_up = _add_adapter(products, dx, dz, gate_up_lora_b, gate_up_lora_a)
    if dx is not None:
        grads[0] = sum_slots(dx, routing.rows, None, routing.top_k)
        del dx
    if need_up_a:
        assert hidden_states is not None
        x = routing.rows_of(hidden_states, None)
        grads[2] = products.multiply_transposed(low_up, x, dtype)
    if need_up_b:
        assert gate_up_low_rank is not None
        grads[3] = products.multiply_transposed(dz, gate_up_low_rank, dtype)
    return tuple(grads)


def _add_adapter(
    products: Products,
    y: Tensor | None,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    sources: Tensor | None = None,
) -> Tensor:
    """Return low = x[i] @ first[e] (R, rank), and add low[i] @ second[e] to y, if given.

    Products.multiply explains the sources. With a rank of 0 there is nothing to do.
    """
    if first.shape[2] == 0:
        return x.new_empty(products.num_rows, 0)
    low = products.multiply(x, first, sources=sources)
    if y is not None:
        y += products.multiply(low, second)
    return low
