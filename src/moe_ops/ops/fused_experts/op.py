# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts: a whole layer of experts, from hidden states to hidden states.

If a gradient is recorded, fused_experts_forward runs in its place and also returns what the
backward needs. Without a gradient none of that is kept. The backward is two ops: between them the
pre-activation is freed.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented, is_transposed
from moe_ops.ops.fused_experts import pytorch
from moe_ops.ops.fused_experts.gradients import Gradients, forget_saved
from moe_ops.ops.fused_experts.quantized import quantized_experts
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("fused_experts")
_op.implement("pytorch", pytorch.fused_experts, for_backward=False)
_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts", for_backward=False)

_forward_op = Op("fused_experts_forward")
_forward_op.implement("pytorch", pytorch.fused_experts, for_backward=True)
_forward_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts", for_backward=True)

_down_backward_op = Op("fused_experts_down_backward")
_down_backward_op.implement("pytorch", pytorch.fused_experts_down_backward)
_down_backward_op.implement(
    "triton", "moe_ops.ops.fused_experts.triton:fused_experts_down_backward"
)

_up_backward_op = Op("fused_experts_up_backward")
_up_backward_op.implement("pytorch", pytorch.fused_experts_up_backward)
_up_backward_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts_up_backward")


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    hidden_states, gate_up_proj, down_proj, _, topk_weights, gate_up_bias, down_bias, *flags = args
    *activation, weights_before, recompute, config = flags
    _, pre_activation, *routing = outputs
    need_x, need_up, need_down, _, need_weights, need_up_bias, need_down_bias, *_ = ctx.needs
    needed = Gradients.of(
        hidden_states=need_x, gate_up_proj=need_up, down_proj=need_down, topk_weights=need_weights,
        gate_up_bias=need_up_bias, down_bias=need_down_bias, weights_before=weights_before,
        recompute=recompute,
    )  # fmt: skip
    kept = needed.kept(hidden_states, topk_weights, gate_up_bias, down_bias, pre_activation)
    ctx.save_for_backward(gate_up_proj, down_proj, *kept, *routing)
    ctx.down_flags = (
        *activation, weights_before, needed.of_down, is_transposed(down_proj), config
    )  # fmt: skip
    ctx.up_flags = (topk_weights.shape[1], needed.of_up, is_transposed(gate_up_proj), config)
    ctx.weights_before, ctx.needs_up = weights_before, any(needed.of_up)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate_up_proj, down_proj, x, topk_weights, *biases, z, counts, gather, scatter = (
        ctx.saved_tensors
    )
    # Unless somebody retains the graph, nothing but z itself holds the pre-activation from here on.
    forget_saved(ctx)
    dz, grad_down, grad_weights, grad_down_bias = _down_backward_op.in_backward(
        grad_output, x, gate_up_proj, down_proj, topk_weights, *biases, z, counts, gather, scatter,
        *ctx.down_flags,
    )  # fmt: skip
    # It is freed here: the largest gradient is not made yet.
    del z
    grad_x = grad_up = grad_up_bias = None
    if ctx.needs_up:
        before = topk_weights if ctx.weights_before else None
        grad_x, grad_up, grad_before, grad_up_bias = _up_backward_op.in_backward(
            dz, x, gate_up_proj, before, counts, gather, scatter, *ctx.up_flags
        )
        grad_weights = grad_before if ctx.weights_before else grad_weights
    return grad_x, grad_up, grad_down, None, grad_weights, grad_up_bias, grad_down_bias


_op.differentiate(_save, _backward, forward=_forward_op)


@documented
def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor | QuantizedWeight,
    down_proj: torch.Tensor | QuantizedWeight,
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
    others = (
        topk_ids, topk_weights, gate_up_bias, down_bias, activation, gated, interleaved,
        activation_limit, weights_before, recompute, kernel_config,
    )  # fmt: skip
    if isinstance(gate_up_proj, QuantizedWeight) or isinstance(down_proj, QuantizedWeight):
        return quantized_experts(hidden_states, gate_up_proj, down_proj, *others)
    return _op.overload(hidden_states, gate_up_proj, down_proj, *others)
