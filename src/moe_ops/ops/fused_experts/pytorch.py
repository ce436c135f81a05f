# SPDX-License-Identifier: Apache-2.0
"""fused_experts and its backward in PyTorch.

T num_tokens, H hidden_size, I intermediate_size, E experts, K top_k, R = T * K routed rows in
expert order, U = 2 * I where gated, else I.

x are hidden states, z pre-activations, h activations, y the experts' outputs; d... are gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._pytorch.activation import Activation
from moe_ops._pytorch.dequantize import matrices
from moe_ops._pytorch.products import Products
from moe_ops._pytorch.routing import routing_indices
from moe_ops._pytorch.rows import (
    chunks,
    rows_of_slots,
    sum_slots,
    tokens_of_rows,
    weights_of_rows,
)
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
    routing = _Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    weights = routing.without_dropped(topk_weights)
    before, after = (weights, None) if weights_before else (None, weights)
    act = Activation(activation, gated, interleaved, activation_limit)
    z = _up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, before)
    h = _activated(z, act, routing.products.tail)
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

    routing = _Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
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
        z = _up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, before)
    dh = None
    if need_dz or need_dots:
        dh = products.multiply(dy, matrices(down_proj, dy.dtype))
    h, dz, dots = _activated_backward(
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

    routing = _Routing(token_counts, gather_indices, scatter_indices, top_k)
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
    routing = _Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
    products = routing.products
    act = Activation(activation, gated, interleaved, activation_limit)
    z = _up_projection(hidden_states, gate_up_proj, gate_up_bias, routing, None)
    low_up = _add_adapter(
        products, z, hidden_states, gate_up_lora_a.mT, gate_up_lora_b.mT, routing.tokens
    )
    h = _activated(z, act, products.tail)
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
    routing = _Routing(token_counts, gather_indices, scatter_indices, topk_weights.shape[1])
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
        h, dz, dots = _activated_backward(
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


class _Routing:
    """Which rows belong to which slots.

    Attributes:
        products: of the rows.
        tokens: the token of each row, (R,).
        rows: the row of each slot, (R,).
        dropped: which slots belong to no expert, (T, K).
    """

    def __init__(self, token_counts: Tensor, gather: Tensor, scatter: Tensor, top_k: int) -> None:
        self.top_k = top_k
        self.gather = gather
        self.products = Products(token_counts, gather.shape[0])
        self.tokens = tokens_of_rows(gather, top_k)
        self.rows = rows_of_slots(gather, scatter)
        self.dropped = (scatter >= self.products.tail).view(-1, top_k)

    def without_dropped(self, of_slots: Tensor) -> Tensor:
        """Return a value of each slot (T, K), zero for dropped slots, where NaN may stand."""
        return of_slots.masked_fill(self.dropped, 0.0)

    def by_slot(self, of_rows: Tensor) -> Tensor:
        """Return a value of each row (R,) in the order of slots, (T, K)."""
        return of_rows.index_select(0, self.rows).view(-1, self.top_k)

    def rows_of(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return x[t] of each row, or weights[t, k] * x[t] in fp32 (fp64 for fp64), (R, H)."""
        if weights is None:
            return x.index_select(0, self.tokens)
        scale = weights_of_rows(weights, self.gather)
        rows = x.new_empty(len(self.tokens), x.shape[1])
        for part in chunks(*rows.shape):
            rows[part] = x.index_select(0, self.tokens[part]) * scale[part]
        return rows

    def dots_with_tokens(self, dx: Tensor, x: Tensor) -> Tensor:
        """Return <dx[i], x[t]> of each row, (R,), in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dots = dx.new_empty(len(dx), dtype=wide)
        for part in chunks(*dx.shape):
            of_rows = x.index_select(0, self.tokens[part]).to(wide)
            dots[part] = torch.linalg.vecdot(dx[part].to(wide), of_rows)
        return dots

    def bias_dots(self, grad_output: Tensor, down_bias: Tensor) -> Tensor:
        """Return <grad_output[t], down_bias[e]> of each slot, (T, K); any for dropped slots."""
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        dots = grad_output.to(wide) @ down_bias.to(wide).t()
        experts = dots.new_zeros(len(self.rows), dtype=torch.int64)
        experts[: self.products.tail] = self.products.experts_of_rows(dots.device)
        return dots.gather(1, experts.index_select(0, self.rows).view(-1, self.top_k))


def _up_projection(
    hidden_states: Tensor,
    gate_up_proj: Tensor | StoredWeight,
    bias: Tensor | None,
    routing: _Routing,
    weights: Tensor | None,
) -> Tensor:
    """Return z (R, U). Weights, if they are given, multiply the rows before the product."""
    products, weight = routing.products, matrices(gate_up_proj, hidden_states.dtype).mT
    if weights is not None:
        return products.multiply(routing.rows_of(hidden_states, weights), weight, bias)
    return products.multiply(hidden_states, weight, bias, sources=routing.tokens)


def _activated(z: Tensor, act: Activation, tail: int) -> Tensor:
    """Return h (R, I). Nothing is written to the rows of no expert, which nobody reads."""
    h = z.new_empty(z.shape[0], z.shape[1] // 2 if act.gated else z.shape[1])
    for part in chunks(tail, z.shape[1]):
        h[part] = act.apply(z[part])
    return h


def _activated_backward(
    z: Tensor,
    dh: Tensor | None,
    scale: Tensor | None,
    act: Activation,
    tail: int,
    need_h: bool,
    need_dz: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale * h (R, I), dz (R, U) and <dh, h> (R,), as Activation.backward does.

    Those that are not needed are empty. The rows of no expert are zero.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    h = z.new_empty(z.shape[0] if need_h else 0, z.shape[1] // 2 if act.gated else z.shape[1])
    dz = z.new_empty(z.shape if need_dz else 0)
    dots = z.new_empty(z.shape[0] if need_dots else 0, dtype=wide)
    for part in chunks(tail, z.shape[1]):
        act.backward(
            z[part],
            None if dh is None else dh[part],
            None if scale is None else scale[part],
            h=h[part] if need_h else None,
            grad_z=dz[part] if need_dz else None,
            dots=dots[part] if need_dots else None,
        )
    for rows in (h, dz, dots):
        rows[tail:].zero_()
    return h, dz, dots


def _grad_weight(products: Products, dy: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """Return sum_i outer(dy[i], x[i]) over the rows of each expert, stored as the weight is."""
    if transposed:
        return products.multiply_transposed(x, dy, dy.dtype).mT
    return products.multiply_transposed(dy, x, dy.dtype)
