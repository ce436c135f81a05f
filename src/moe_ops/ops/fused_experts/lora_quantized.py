# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts_lora_quantized and its gradient: fused_experts_lora's, with stored weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops._core.library import Op, function_of
from moe_ops.ops.fused_experts.lora import kept_for_backward
from moe_ops.quantization.stored import NUM_STORED, StoredWeight
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("fused_experts_lora_quantized")
_forward_op = Op("fused_experts_lora_quantized_forward")
_backward_op = Op("fused_experts_lora_quantized_backward")


def fused_experts_lora_quantized(
    hidden_states: Tensor, *arguments: Any, by: str, for_backward: bool
) -> Any:
    """Compute fused_experts_lora with the function of `by`: pytorch or triton."""
    stored, others = arguments[: 2 * NUM_STORED], arguments[2 * NUM_STORED :]
    _, _, _, _, down_lora_a, *_ = others
    weights = _weights(stored, hidden_states.shape[1], down_lora_a.shape[2])
    return function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts_lora")(
        hidden_states, *weights, *others, for_backward=for_backward
    )


def fused_experts_lora_quantized_backward(
    grad_output: Tensor, hidden_states: Tensor | None, *arguments: Any, by: str
) -> tuple[Tensor, ...]:
    """Compute fused_experts_lora_backward with the function of `by`."""
    stored, others = arguments[: 2 * NUM_STORED], arguments[2 * NUM_STORED :]
    _, _, _, down_lora_a, *_ = others
    weights = _weights(stored, grad_output.shape[1], down_lora_a.shape[2])
    function = function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts_lora_backward")
    grads: tuple[Tensor, ...] = function(grad_output, hidden_states, *weights, *others)
    return grads


def _weights(
    stored: tuple[Any, ...], hidden_size: int, intermediate_size: int
) -> tuple[StoredWeight, StoredWeight]:
    up, down = (*stored[:NUM_STORED], hidden_size), (*stored[NUM_STORED:], intermediate_size)
    return StoredWeight._make(up), StoredWeight._make(down)


for _by in ("pytorch", "triton"):
    _op.implement(_by, fused_experts_lora_quantized, by=_by, for_backward=False)
    _forward_op.implement(_by, fused_experts_lora_quantized, by=_by, for_backward=True)
    _backward_op.implement(_by, fused_experts_lora_quantized_backward, by=_by)


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, *stored = args[: 1 + 2 * NUM_STORED]
    up, down = stored[:NUM_STORED], stored[NUM_STORED:]
    ctx.save_for_backward(
        *up[:4], *down[:4], *kept_for_backward(ctx, x, args[1 + 2 * NUM_STORED :], outputs)
    )
    ctx.layouts = up[4:], down[4:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    stored, (x, weights, *factors) = tensors[:8], tensors[8:14]
    up_layout, down_layout = ctx.layouts
    grad_x, grad_weights, *grad_factors = _backward_op.overload(
        grad_output, x, *stored[:4], *up_layout, *stored[4:], *down_layout, weights, *factors,
        *ctx.scalings, *tensors[14:], *ctx.activation, ctx.wanted, ctx.config,
    )  # fmt: skip
    return grad_x, *[None] * (2 * NUM_STORED + 1), grad_weights, *grad_factors


_op.differentiate(_save, _backward, forward=_forward_op)


def adapted_quantized_experts(
    hidden_states: Tensor,
    gate_up_proj: QuantizedWeight,
    down_proj: QuantizedWeight,
    *others: Any,
) -> Tensor:
    """Call the op, with the arguments of fused_experts_lora in order."""
    output: Tensor = _op.overload(hidden_states, *gate_up_proj.stored, *down_proj.stored, *others)
    return output
