# SPDX-License-Identifier: Apache-2.0
"""What a layer of experts is made of in PyTorch: its routed rows, its up projection, its activation.

T num_tokens, H hidden_size, I intermediate_size, E experts, K top_k, R = T * K routed rows in
expert order, U = 2 * I where gated, else I.

x are hidden states, z pre-activations, h activations; d... are gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._pytorch.activation import Activation
from moe_ops._pytorch.dequantize import matrices
from moe_ops._pytorch.products import Products
from moe_ops._pytorch.rows import chunks, rows_of_slots, tokens_of_rows, weights_of_rows
from moe_ops.quantization.stored import StoredWeight


class Routing:
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


def up_projection(
    hidden_states: Tensor,
    gate_up_proj: Tensor | StoredWeight,
    bias: Tensor | None,
    routing: Routing,
    weights: Tensor | None,
) -> Tensor:
    """Return z (R, U). Weights, if they are given, multiply the rows before the product."""
    products, weight = routing.products, matrices(gate_up_proj, hidden_states.dtype).mT
    if weights is not None:
        return products.multiply(routing.rows_of(hidden_states, weights), weight, bias)
    return products.multiply(hidden_states, weight, bias, sources=routing.tokens)


def activated(z: Tensor, act: Activation, tail: int) -> Tensor:
    """Return h (R, I). Nothing is written to the rows of no expert, which nobody reads."""
    h = z.new_empty(z.shape[0], z.shape[1] // 2 if act.gated else z.shape[1])
    for part in chunks(tail, z.shape[1]):
        h[part] = act.apply(z[part])
    return h


def activated_backward(
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
