# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts_quantized, one composition for PyTorch and for Triton, and its gradient.

A weight is dequantised right before its product and freed after it, in forward as in backward. So
one of the two is there at a time, and nothing of their size is kept between the passes.

H hidden_size, I intermediate_size, U rows of gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops._core.library import Op, function_of
from moe_ops.ops.fused_experts.gradients import Gradients
from moe_ops.ops.fused_experts.weight import Weight
from moe_ops.quantization.weight import NUM_STORED, QuantizedWeight

_op = Op("fused_experts_quantized")
_forward_op = Op("fused_experts_quantized_forward")


def fused_experts_quantized(
    hidden_states: Tensor,
    gate_up_codes: Tensor,
    gate_up_scale: Tensor,
    gate_up_nested_scale: Tensor | None,
    gate_up_nested_offset: Tensor | None,
    gate_up_format: str,
    gate_up_group_size: int,
    gate_up_scale_encoding: str,
    down_codes: Tensor,
    down_scale: Tensor,
    down_nested_scale: Tensor | None,
    down_nested_offset: Tensor | None,
    down_format: str,
    down_group_size: int,
    down_scale_encoding: str,
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
    by: str,
    for_backward: bool,
) -> Any:
    """Compute fused_experts with the functions of `by`: pytorch or triton.

    Each weight is dequantised when its product asks for it.
    """
    dequantize_weight = function_of(f"moe_ops._{by}.dequantize:dequantize_weight")
    fused_experts = function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts")

    def weight(*stored: Any) -> Weight:
        return lambda in_features: dequantize_weight(*stored, in_features, hidden_states.dtype)

    gate_up_proj = weight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding,
    )  # fmt: skip
    down_proj = weight(
        down_codes, down_scale, down_nested_scale, down_nested_offset, down_format,
        down_group_size, down_scale_encoding,
    )  # fmt: skip
    return fused_experts(
        hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_bias, down_bias,
        activation, gated, interleaved, activation_limit, weights_before, recompute,
        kernel_config, for_backward=for_backward,
    )  # fmt: skip


for _by in ("pytorch", "triton"):
    _op.implement(_by, fused_experts_quantized, by=_by, for_backward=False)
    _forward_op.implement(_by, fused_experts_quantized, by=_by, for_backward=True)


def _gate_up(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[:NUM_STORED]


def _down(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[NUM_STORED : 2 * NUM_STORED]


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    hidden_states, gate_up, down = args[0], _gate_up(args[1:]), _down(args[1:])
    _, topk_weights, gate_up_bias, down_bias, *flags = args[1 + 2 * NUM_STORED :]
    *activation, weights_before, recompute, config = flags
    _, pre_activation, *routing = outputs
    need_x, needs = ctx.needs[0], ctx.needs[1 + 2 * NUM_STORED :]
    _, need_weights, need_up_bias, need_down_bias, *_ = needs
    needed = Gradients.of(
        hidden_states=need_x, topk_weights=need_weights, gate_up_bias=need_up_bias,
        down_bias=need_down_bias, weights_before=weights_before, recompute=recompute,
    )  # fmt: skip
    kept = needed.kept(hidden_states, topk_weights, gate_up_bias, down_bias, pre_activation)
    ctx.save_for_backward(*gate_up[:4], *down[:4], *kept, *routing)
    ctx.gate_up_layout, ctx.down_layout = gate_up[4:], down[4:]
    ctx.down_flags = (*activation, weights_before, needed.of_down, False, config)
    ctx.up_flags = (topk_weights.shape[1], needed.of_up, False, config)
    gated = activation[1]
    num_experts, width = gate_up[0].shape[:2]
    ctx.sizes = (num_experts, width, hidden_states.shape[1], width // 2 if gated else width)
    ctx.weights_before, ctx.recomputes = weights_before, needed.recomputes
    # Gradients of biases are sums of rows.
    ctx.reads_down = needed.reads_activation
    ctx.reads_gate_up = needed.of_up[0] or needed.of_up[2]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *stored, x, topk_weights, gate_up_bias, down_bias, z, counts, gather, scatter = (
        ctx.saved_tensors
    )
    # Unless somebody retains the graph, nothing but z itself holds the pre-activation from here on.
    ctx.maybe_clear_saved_tensors()
    num_experts, width, hidden, inner = ctx.sizes

    def gate_up(is_read: bool) -> Tensor:
        shape = (num_experts, width, hidden)
        return _weight(is_read, grad_output, stored[:4], ctx.gate_up_layout, shape)

    gate_up_proj = gate_up(ctx.recomputes)
    shape = (num_experts, hidden, inner)
    down_proj = _weight(ctx.reads_down, grad_output, stored[4:], ctx.down_layout, shape)
    dz, _, grad_weights, grad_down_bias = torch.ops.moe.fused_experts_down_backward.default(
        grad_output, x, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, z, counts,
        gather, scatter, *ctx.down_flags,
    )  # fmt: skip
    del z, down_proj
    grad_x = grad_up_bias = None
    if any(ctx.up_flags[1]):
        if not ctx.recomputes:
            gate_up_proj = gate_up(ctx.reads_gate_up)
        before = topk_weights if ctx.weights_before else None
        grad_x, _, grad_before, grad_up_bias = torch.ops.moe.fused_experts_up_backward.default(
            dz, x, gate_up_proj, before, counts, gather, scatter, *ctx.up_flags
        )
        grad_weights = grad_before if ctx.weights_before else grad_weights
    return grad_x, *[None] * (2 * NUM_STORED + 1), grad_weights, grad_up_bias, grad_down_bias


def _weight(
    is_read: bool,
    grad_output: Tensor,
    stored: Sequence[Tensor | None],
    layout: Sequence[Any],
    shape: tuple[int, ...],
) -> Tensor:
    """Return a weight in the dtype of grad_output, or one number in its shape if nobody reads it."""
    if not is_read:
        return grad_output.new_empty(()).expand(shape)
    weight: Tensor = torch.ops.moe.dequantize_weight.default(
        *stored, *layout, shape[2], grad_output.dtype
    )
    return weight


_op.differentiate(_save, _backward, forward=_forward_op)


def quantized_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor | QuantizedWeight,
    down_proj: Tensor | QuantizedWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    *others: Any,
) -> Tensor:
    """Call the op for fused_experts' arguments.

    Raises:
        TypeError: one of the two weights is a plain tensor.
        ValueError: a weight has another width. A row's padding hides it from the op.
    """
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(
                f"moe::fused_experts: expected {name} to be a moe_ops.QuantizedWeight, since the "
                f"other weight is one, got {type(weight).__name__}; quantise it with "
                "moe_ops.quantize_weight, or pass the other weight's .dequantize()"
            )
    assert isinstance(gate_up_proj, QuantizedWeight)
    assert isinstance(down_proj, QuantizedWeight)
    function = "moe::fused_experts"
    if hidden_states.dim() == 2:
        width = hidden_states.shape[1]
        gate_up_proj.check_width(function, "gate_up_proj", width, "hidden_states.shape[1]")
    divisor, inner = (2, "gate_up_proj.shape[1] // 2") if gated else (1, "gate_up_proj.shape[1]")
    down_proj.check_width(function, "down_proj", gate_up_proj.shape[1] // divisor, inner)
    output: Tensor = _op.overload(
        hidden_states, *gate_up_proj.stored, *down_proj.stored, topk_ids, topk_weights,
        gate_up_bias, down_bias, activation, gated, *others,
    )  # fmt: skip
    return output
