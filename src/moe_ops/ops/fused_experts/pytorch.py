# SPDX-License-Identifier: Apache-2.0
"""fused_experts and its backward in PyTorch: what the other ops do, and the activation between.

The others' CPU implementations are called as functions: their arguments follow from checked ones,
and a call of an op takes longer than a small product.

T num_tokens, H hidden_size, I intermediate_size, E experts, K top_k, R = T * K routed rows in
expert order, U = 2 * I where gated, else I.

The activation is computed in fp32 (fp64 for fp64), a few rows at a time, so that what stands
between its steps stays in the cache; each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moe_ops._pytorch.rows import (
    chunks,
    expert_ends,
    rows_of_slots,
    sum_slots,
    tokens_of_rows,
)
from moe_ops.ops.grouped_gemm.pytorch import (
    batched_products,
    grouped_gemm,
    grouped_gemm_dw,
    grouped_gemm_dx,
)
from moe_ops.ops.permute.pytorch import permute
from moe_ops.ops.routing_indices.pytorch import routing_indices
from moe_ops.ops.unpermute.pytorch import unpermute, unpermute_backward


def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    recompute: str = "none",
    kernel_config: str | None = None,
) -> torch.Tensor:
    output, *_ = fused_experts_forward(
        hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_bias, down_bias,
        activation, gated, interleaved, activation_limit, weights_before, recompute, kernel_config,
    )  # fmt: skip
    return output


def fused_experts_forward(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    recompute: str = "none",
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    top_k = topk_ids.shape[1]
    routing = _Routing(top_k, *routing_indices(topk_ids, gate_up_proj.shape[0]))
    act = _Activation(activation, gated, interleaved, activation_limit)
    weights = routing.without_dropped(topk_weights)
    x = routing.weighted_rows(hidden_states, weights) if weights_before else hidden_states
    z = _up_projection(x, gate_up_proj, gate_up_bias, routing, in_expert_order=weights_before)
    h = act.forward(z, routing.tail)
    after = None if weights_before else weights
    output = _product_by_token(h, down_proj.mT, down_bias, routing, after)
    kept = z if recompute == "none" else z.new_empty(0)
    return output, kept, routing.counts, routing.gather, routing.scatter


def fused_experts_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    pre_activation: torch.Tensor | None,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor,
    scatter_indices: torch.Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    weights_before: bool,
    needs: list[bool],
    transposed: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, ...]:
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needs
    need_dots = need_weights and not weights_before
    need_dx = need_x or (need_weights and weights_before)
    need_dz = need_dx or need_gate_up or need_gate_up_bias
    counts, top_k = token_counts, topk_weights.shape[1]
    routing = _Routing(top_k, counts, gather_indices, scatter_indices)
    weights = routing.without_dropped(topk_weights)
    after = None if weights_before else weights
    grads = [grad_output.new_empty(0) for _ in needs]
    if not any(needs):
        return tuple(grads)

    dy = permute(grad_output, gather_indices, top_k, scatter_indices)
    if need_down_bias:
        grads[5] = _grad_bias(dy, routing, after)
    if not any(needs[:5]):
        return tuple(grads)

    x = hidden_states
    if weights_before and x is not None and (need_gate_up or pre_activation is None):
        x = routing.weighted_rows(x, weights)
    z = pre_activation
    if z is None:
        z = _up_projection(x, gate_up_proj, gate_up_bias, routing, in_expert_order=weights_before)
    dh = _dx(dy, down_proj, counts) if need_dz or need_dots else None
    act = _Activation(activation, gated, interleaved, activation_limit)
    h, dz, dots = act.backward(
        z, dh, routing.of_rows(after), routing.tail, need_down, need_dz, need_dots
    )
    if need_down:
        grads[2] = _dw(dy, h, counts, transposed[1])
    del dy, dh, h
    if need_dots:
        grads[3] = routing.of_slots(dots)
        if down_bias is not None:
            grads[3] += _bias_dots(grad_output, down_bias, routing)
    if need_gate_up_bias:
        grads[4] = _grad_bias(dz, routing)
    if need_gate_up:
        # With weights_before the rows are in expert order already.
        gather = None if weights_before else gather_indices
        grads[1] = _dw(dz, x, counts, transposed[0], gather, top_k)
    if need_dx and weights_before:
        rows = _dx(dz, gate_up_proj, counts)
        needs_before = [need_x, need_weights]
        grads[0], grads[3] = _weighted_rows_backward(
            rows, hidden_states, topk_weights, weights, routing, needs_before
        )
    elif need_x:
        grads[0] = _product_by_token(dz, gate_up_proj, None, routing, None)
    if need_weights:
        grads[3] = grads[3].masked_fill(routing.dropped, 0.0).to(topk_weights.dtype)
    return tuple(grads)


def _up_projection(
    x: torch.Tensor | None,
    gate_up_proj: torch.Tensor,
    bias: torch.Tensor | None,
    routing: _Routing,
    *,
    in_expert_order: bool,
) -> torch.Tensor:
    assert x is not None  # the schema's `where` says so
    if in_expert_order:
        return grouped_gemm(x, gate_up_proj, routing.counts, bias=bias)
    return grouped_gemm(
        x, gate_up_proj, routing.counts, routing.gather, None, bias, routing.top_k, permute_x=True
    )


def _product_by_token(
    rows: torch.Tensor,
    matrices: torch.Tensor,
    bias: torch.Tensor | None,
    routing: _Routing,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The sum of weights[slot] * (rows[i] @ matrices[e] + bias[e]) over each token's rows."""
    counts, top_k = routing.counts, routing.top_k
    if bias is None and routing.tail == routing.num_rows:
        batched = batched_products(rows, matrices, counts)
        if batched is not None:
            products, places = batched
            slots = rows_of_slots(routing.gather, routing.scatter)
            return sum_slots(products, places.index_select(0, slots), weights, top_k)
    y = grouped_gemm(rows, matrices.mT, counts, bias=bias)
    return unpermute(y, routing.gather, weights, top_k, routing.scatter)


def _weighted_rows_backward(
    grad_rows: torch.Tensor,
    hidden_states: torch.Tensor | None,
    topk_weights: torch.Tensor,
    weights: torch.Tensor,
    routing: _Routing,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of hidden_states and topk_weights; `weights` are zero for dropped slots."""
    gather, scatter, top_k = routing.gather, routing.scatter, routing.top_k
    grad_x = grad_weights = grad_rows.new_empty(0)
    if needs[0]:
        grad_x = unpermute(grad_rows, gather, weights, top_k, scatter)
    if needs[1]:
        assert hidden_states is not None  # the schema's `where` says so
        _, grad_weights = unpermute_backward(
            hidden_states, grad_rows, gather, topk_weights, top_k, scatter, [False, True]
        )
    return grad_x, grad_weights


def _dx(dy: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """dy[i] @ weight[e] of the rows of each expert e."""
    needs = [True, False]
    grad, _ = grouped_gemm_dx(dy, weight, counts, None, None, None, None, 1, False, False, needs)
    return grad


def _dw(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    counts: torch.Tensor,
    transposed: bool,
    gather: torch.Tensor | None = None,
    top_k: int = 1,
) -> torch.Tensor:
    """sum_i outer(dy[i], x[i]) over the rows of each expert; x is in token order with `gather`."""
    assert x is not None  # the schema's `where` says so
    needs, permute_x = [True, False], gather is not None
    grad, _ = grouped_gemm_dw(
        dy, x, counts, gather, None, top_k, permute_x, False, needs, transposed
    )
    return grad


def _grad_bias(
    dy: torch.Tensor, routing: _Routing, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_i weights[slot of i] * dy[i] over the rows of each expert."""
    top_k, needs = routing.top_k, [False, True]
    _, grad = grouped_gemm_dw(
        dy, dy, routing.counts, routing.gather, weights, top_k, False, False, needs, False
    )
    return grad


def _bias_dots(
    grad_output: torch.Tensor, down_bias: torch.Tensor, routing: _Routing
) -> torch.Tensor:
    """<grad_output[t], down_bias[e]> of each slot, (T, K)."""
    accumulator = torch.promote_types(grad_output.dtype, torch.float32)
    dots = grad_output.to(accumulator) @ down_bias.to(accumulator).t()
    return dots.gather(1, routing.experts)


class _Routing:
    """Which rows belong to which slots; corrupt indices are clamped, as rows.py does."""

    def __init__(
        self, top_k: int, counts: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor
    ) -> None:
        self.top_k, self.counts, self.gather, self.scatter = top_k, counts, gather, scatter
        self.num_rows = gather.shape[0]
        # The rows from here on belong to no expert.
        self.tail = expert_ends(counts, self.num_rows).tail

    @property
    def dropped(self) -> torch.Tensor:
        """Which slots belong to no expert, (T, K)."""
        return (self.scatter >= self.tail).view(-1, self.top_k)

    @property
    def experts(self) -> torch.Tensor:
        """The expert of each slot, (T, K); any where there is none."""
        ends = self.counts.clamp(0, self.num_rows).cumsum(0)
        found = torch.searchsorted(ends, self.scatter.to(ends.dtype).contiguous(), right=True)
        return found.clamp_(max=len(ends) - 1).view(-1, self.top_k)

    def without_dropped(self, topk_weights: torch.Tensor) -> torch.Tensor:
        """topk_weights, zero for the slots that belong to no expert: NaN may stand there."""
        if self.tail == self.num_rows:
            return topk_weights
        return topk_weights.masked_fill(self.dropped, 0.0)

    def of_rows(self, by_slot: torch.Tensor | None) -> torch.Tensor | None:
        """(T, K) -> (R, 1)."""
        if by_slot is None:
            return None
        slots = self.gather.clamp(0, max(self.num_rows - 1, 0))
        return by_slot.reshape(-1, 1).index_select(0, slots)

    def of_slots(self, by_row: torch.Tensor) -> torch.Tensor:
        """(R,) -> (T, K)."""
        rows = self.scatter.clamp(0, max(self.num_rows - 1, 0))
        return by_row.index_select(0, rows).view(-1, self.top_k)

    def weighted_rows(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """weights[t, k] * x[t] of each row, (R, H), multiplied in fp32 (fp64 for fp64)."""
        accumulator = torch.promote_types(x.dtype, torch.float32)
        tokens, scale = tokens_of_rows(self.gather, self.top_k), self.of_rows(weights)
        assert scale is not None
        scale = scale.to(accumulator)
        rows = x.new_empty(self.num_rows, x.shape[1])
        for part in chunks(self.num_rows, x.shape[1]):
            gathered = x.index_select(0, tokens[part]).to(accumulator)
            torch.mul(gathered, scale[part], out=rows[part])
        return rows


def _wide_chunks(rows: torch.Tensor, num_rows: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk of the first num_rows rows, in fp32 (fp64 for fp64), until the next one is asked for."""
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    parts = list(chunks(num_rows, rows.shape[1]))
    # One for all: new memory would not be in the cache.
    memory: torch.Tensor | None = None
    for part in parts:
        if rows.dtype == accumulator or len(parts) == 1:
            yield part, rows[part].to(accumulator)
            continue
        if memory is None:
            memory = torch.empty_like(rows[part], dtype=accumulator)
        yield part, memory[: part.stop - part.start].copy_(rows[part])


def _store_product(out: torch.Tensor, values: torch.Tensor, factor: torch.Tensor | float) -> None:
    """out = values * factor, rounded to out's dtype; values may be overwritten."""
    if out.dtype == values.dtype:
        torch.mul(values, factor, out=out)
    else:
        # With `out` the product would first be stored in new memory.
        out.copy_(values.mul_(factor))


@dataclass(frozen=True)
class _Function:
    """act(gate), stored in `out`, which may be gate; and grad times its derivative, of (grad, gate).

    up + up_offset multiplies act(gate).
    """

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    up_offset: float = 0.0


# What functional calls; its own take no `out`, and torch.ops' take long to call.
_nn: Any = torch._C._nn
_aten = torch.ops.aten
_FUNCTIONS = {
    "silu": _Function(lambda gate, out: _nn.silu(gate, out=out), _aten.silu_backward),
    "gelu": _Function(lambda gate, out: _nn.gelu(gate, out=out), _aten.gelu_backward),
    "gelu_tanh": _Function(
        lambda gate, out: _nn.gelu(gate, approximate="tanh", out=out),
        lambda grad, gate: _aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "relu": _Function(
        lambda gate, out: torch.clamp(gate, min=0, out=out),
        lambda grad, gate: _aten.threshold_backward(grad, gate, 0),
    ),
    "relu_squared": _Function(
        lambda gate, out: torch.clamp(gate, min=0, out=out).square_(),
        lambda grad, gate: functional.relu(gate).mul_(2).mul_(grad),
    ),
    # gate * sigmoid(1.702 * gate) is silu(1.702 * gate) / 1.702.
    "swiglu_oai": _Function(
        lambda gate, out: _nn.silu(torch.mul(gate, 1.702, out=out), out=out).div_(1.702),
        lambda grad, gate: _aten.silu_backward(grad, gate * 1.702),
        up_offset=1.0,
    ),
}


class _Activation:
    """h of z, and back, in the rows before `tail`, those that belong to an expert."""

    def __init__(self, name: str, gated: bool, interleaved: bool, limit: float | None) -> None:
        self.function = _FUNCTIONS[name]
        self.gated, self.interleaved, self.limit = gated, interleaved, limit

    def forward(self, z: torch.Tensor, tail: int) -> torch.Tensor:
        """h (R, I) of z (R, U); nothing is written to the other rows, whose products are thrown away."""
        h = self._new_h(z)
        for part, wide in _wide_chunks(z, tail):
            gate, up = self._limited(*self._read(wide))
            rounded = h.dtype != wide.dtype
            # What is to be rounded stands in memory that the next chunk overwrites.
            values = self.function.forward(gate, gate if rounded else h[part])
            if up is not None:
                values.mul_(up)
            if rounded:
                h[part].copy_(values)
        return h

    def backward(
        self,
        z: torch.Tensor,
        dh: torch.Tensor | None,
        scale: torch.Tensor | None,
        tail: int,
        need_h: bool,
        need_dz: bool,
        need_dots: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """scale * h (R, I); dz (R, U) where the gradient of h is scale * dh; <dh, h> (R,) in fp32.

        Those not needed are empty. scale is (R, 1), and 1 where None. dh may be overwritten. The other
        rows are zero, for products of corrupt counts.
        """
        h = self._new_h(z) if need_h else z.new_empty(0)
        dz = z.new_empty(z.shape if need_dz else 0)
        accumulator = torch.promote_types(z.dtype, torch.float32)
        dots = z.new_empty(z.shape[0] if need_dots else 0, dtype=accumulator)
        for part, wide in _wide_chunks(z, tail):
            z_gate, z_up = self._read(wide)
            gate, up = self._limited(z_gate, z_up)
            values = self.function.forward(gate, torch.empty_like(gate))
            product = values if up is None else values * up
            s = 1.0 if scale is None else scale[part].to(accumulator)
            d = None if dh is None else dh[part].to(accumulator)
            if need_dots and d is not None:
                dots[part] = torch.linalg.vecdot(d, product)
            if need_h:
                _store_product(h[part], product, s)
            if need_dz and d is not None:
                d = d if scale is None else d.mul_(s)
                dz_gate, dz_up = self._halves(dz[part])
                if up is not None and z_up is not None and dz_up is not None:
                    _store_product(dz_up, values, d)
                    d = d.mul_(up)
                dz_gate.copy_(self.function.backward(d, gate))
                if self.limit is not None:
                    dz_gate.masked_fill_(z_gate > self.limit, 0.0)
                    if z_up is not None and dz_up is not None:
                        dz_up.masked_fill_(z_up.abs() > self.limit, 0.0)
        for of_rows in (h, dz, dots):
            of_rows[tail:].zero_()
        return h, dz, dots

    def _new_h(self, z: torch.Tensor) -> torch.Tensor:
        return z.new_empty(z.shape[0], z.shape[1] // 2 if self.gated else z.shape[1])

    def _halves(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of gate and up."""
        if not self.gated:
            return z, None
        if self.interleaved:
            return z[:, 0::2], z[:, 1::2]
        half = z.shape[1] // 2
        return z[:, :half], z[:, half:]

    def _read(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gate and up to compute with: not interleaved, which is slow."""
        gate, up = self._halves(z)
        if self.interleaved:
            gate, up = gate.contiguous(), None if up is None else up.contiguous()
        return gate, up

    def _limited(
        self, gate: torch.Tensor, up: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the function takes, and what multiplies it."""
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = None if up is None else up.clamp(-self.limit, self.limit)
        if up is not None and self.function.up_offset:
            up = up + self.function.up_offset
        return gate, up
