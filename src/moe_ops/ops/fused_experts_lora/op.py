# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts_lora and its gradient: a layer of frozen experts with adapters, in one call.

Adapters are thin, so in a small step they cost the host more than the device. As one op, all products
of the layer are one call, and all gradients another.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops._core.library import Op
from moe_ops.ops.fused_experts_lora import pytorch

_op = Op("fused_experts_lora")
_forward_op = Op("fused_experts_lora_forward")
_backward_op = Op("fused_experts_lora_backward")

_TRITON = "moe_ops.ops.fused_experts_lora.triton"
_op.implement("pytorch", pytorch.fused_experts_lora, for_backward=False)
_op.implement("triton", f"{_TRITON}:fused_experts_lora", for_backward=False)
_forward_op.implement("pytorch", pytorch.fused_experts_lora, for_backward=True)
_forward_op.implement("triton", f"{_TRITON}:fused_experts_lora", for_backward=True)
_backward_op.implement("pytorch", pytorch.fused_experts_lora_backward)
_backward_op.implement("triton", f"{_TRITON}:fused_experts_lora_backward")


def kept_for_backward(
    ctx: Any, x: Tensor, args: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the tensors that the backward reads beside the projections; ctx gets what else it reads.

    Args:
        ctx: of the call.
        x: hidden_states.
        args: the arguments from topk_ids on.
        outputs: of the forward op.
    """
    _, topk_weights, *factors = args[:6]
    _, down_bias, *activation, config = args[6:]
    need_x, needs = ctx.needs[0], ctx.needs[len(ctx.needs) - len(args) :]
    _, need_weights, *need_factors = needs[:6]
    need_up_a, need_up_b, _, need_down_b = need_factors
    _, z, low_up, low_down, *routing = outputs
    ctx.activation, ctx.config = activation, config
    ctx.wanted = [need_x, need_weights, *need_factors]
    return (
        # From it the backward op sees that somebody asks for a second derivative.
        x if need_x or need_up_a else None,
        topk_weights,
        *factors,
        down_bias if need_weights else None,
        z,
        low_up if need_up_b else None,
        low_down if need_down_b else None,
        *routing,
    )


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, gate_up_proj, down_proj, *others = args
    kept = kept_for_backward(ctx, x, tuple(others), outputs)
    ctx.save_for_backward(gate_up_proj, down_proj, *kept)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gate_up_proj, down_proj, x, *others = ctx.saved_tensors
    grad_x, grad_weights, *grad_factors = _backward_op.in_backward(
        grad_output, x, gate_up_proj, down_proj, *others, *ctx.activation, ctx.wanted, ctx.config
    )
    return grad_x, None, None, None, grad_weights, *grad_factors


_op.differentiate(_save, _backward, forward=_forward_op)


def adapted_experts(*arguments: Any) -> Tensor:
    """Call the op, with its arguments in order."""
    output: Tensor = _op.overload(*arguments)
    return output
