# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts_quantized and its gradient: fused_experts' functions, with stored weights.

They decide how to read each weight. Of the two one is there in full size at a time, if at all, and
nothing of their size is kept between the passes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops._core.checks import is_matrix
from moe_ops._core.library import Op, function_of
from moe_ops.ops.fused_experts.gradients import Gradients, forget_saved
from moe_ops.quantization.stored import NUM_STORED, StoredWeight
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("fused_experts_quantized")
_forward_op = Op("fused_experts_quantized_forward")
_down_backward_op = Op("fused_experts_quantized_down_backward")
_up_backward_op = Op("fused_experts_quantized_up_backward")

# The positions, behind hidden_states, of the stored tensors of the two weights.
_UP, _DOWN = slice(0, NUM_STORED), slice(NUM_STORED, 2 * NUM_STORED)


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
    """Compute fused_experts with the function of `by`: pytorch or triton."""
    gate_up_proj = StoredWeight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding, hidden_states.shape[1],
    )  # fmt: skip
    down_proj = StoredWeight(
        down_codes, down_scale, down_nested_scale, down_nested_offset,
        down_format, down_group_size, down_scale_encoding, _inner(gate_up_codes, gated),
    )  # fmt: skip
    return function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts")(
        hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_bias, down_bias,
        activation, gated, interleaved, activation_limit, weights_before, recompute,
        kernel_config, for_backward=for_backward,
    )  # fmt: skip


def fused_experts_quantized_down_backward(
    grad_output: Tensor,
    hidden_states: Tensor | None,
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
    kernel_config: str | None = None,
    *,
    by: str,
) -> tuple[Tensor, ...]:
    """Compute fused_experts_down_backward with the function of `by`."""
    gate_up_proj = StoredWeight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding, grad_output.shape[1],
    )  # fmt: skip
    down_proj = StoredWeight(
        down_codes, down_scale, down_nested_scale, down_nested_offset,
        down_format, down_group_size, down_scale_encoding, _inner(gate_up_codes, gated),
    )  # fmt: skip
    function = function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts_down_backward")
    dz, _, grad_weights, grad_bias = function(
        grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias,
        pre_activation, token_counts, gather_indices, scatter_indices, activation, gated,
        interleaved, activation_limit, weights_before, _with_weight(needs), False, kernel_config,
    )  # fmt: skip
    return dz, grad_weights, grad_bias


def fused_experts_quantized_up_backward(
    grad_pre_activation: Tensor,
    hidden_states: Tensor | None,
    gate_up_codes: Tensor,
    gate_up_scale: Tensor,
    gate_up_nested_scale: Tensor | None,
    gate_up_nested_offset: Tensor | None,
    gate_up_format: str,
    gate_up_group_size: int,
    gate_up_scale_encoding: str,
    hidden_size: int,
    topk_weights: Tensor | None,
    token_counts: Tensor,
    gather_indices: Tensor,
    scatter_indices: Tensor,
    top_k: int,
    needs: list[bool],
    kernel_config: str | None = None,
    *,
    by: str,
) -> tuple[Tensor, ...]:
    """Compute fused_experts_up_backward with the function of `by`."""
    gate_up_proj = StoredWeight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding, hidden_size,
    )  # fmt: skip
    function = function_of(f"moe_ops.ops.fused_experts.{by}:fused_experts_up_backward")
    grad_x, _, grad_weights, grad_bias = function(
        grad_pre_activation, hidden_states, gate_up_proj, topk_weights, token_counts,
        gather_indices, scatter_indices, top_k, _with_weight(needs), False, kernel_config,
    )  # fmt: skip
    return grad_x, grad_weights, grad_bias


def _inner(gate_up_codes: Tensor, gated: bool) -> int:
    """Return intermediate_size."""
    width = gate_up_codes.shape[1]
    return width // 2 if gated else width


def _with_weight(needs: list[bool]) -> list[bool]:
    """Return which gradients the plain op computes: not the weight's, its second."""
    return [needs[0], False, *needs[1:]]


for _by in ("pytorch", "triton"):
    _op.implement(_by, fused_experts_quantized, by=_by, for_backward=False)
    _forward_op.implement(_by, fused_experts_quantized, by=_by, for_backward=True)
    _down_backward_op.implement(_by, fused_experts_quantized_down_backward, by=_by)
    _up_backward_op.implement(_by, fused_experts_quantized_up_backward, by=_by)


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    hidden_states, *stored = args[: 1 + 2 * NUM_STORED]
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
    up, down = stored[_UP], stored[_DOWN]
    ctx.save_for_backward(*up[:4], *down[:4], *kept, *routing)
    ctx.up_layout, ctx.down_layout = up[4:], down[4:]
    # Without the gradients of the weights.
    needs_of_up, needs_of_down = (
        [n[0], *n[2:]] for n in (needed.of_up, needed.of_down)
    )  # fmt: skip
    ctx.down_flags = (*activation, weights_before, needs_of_down, config)
    ctx.up_flags = (topk_weights.shape[1], needs_of_up, config)
    ctx.hidden_size, ctx.weights_before = hidden_states.shape[1], weights_before
    ctx.needs_up = any(needs_of_up)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *stored, x, topk_weights, gate_up_bias, down_bias, z, counts, gather, scatter = (
        ctx.saved_tensors
    )
    # Unless somebody retains the graph, nothing but z itself holds the pre-activation from here on.
    forget_saved(ctx)
    gate_up = (*stored[:4], *ctx.up_layout)
    dz, grad_weights, grad_down_bias = _down_backward_op.in_backward(
        grad_output, x, *gate_up, *stored[4:], *ctx.down_layout, topk_weights, gate_up_bias,
        down_bias, z, counts, gather, scatter, *ctx.down_flags,
    )  # fmt: skip
    del z
    grad_x = grad_up_bias = None
    if ctx.needs_up:
        before = topk_weights if ctx.weights_before else None
        grad_x, grad_before, grad_up_bias = _up_backward_op.in_backward(
            dz, x, *gate_up, ctx.hidden_size, before, counts, gather, scatter, *ctx.up_flags
        )
        grad_weights = grad_before if ctx.weights_before else grad_weights
    return grad_x, *[None] * (2 * NUM_STORED + 1), grad_weights, grad_up_bias, grad_down_bias


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
    # Other rows the op itself refuses.
    if is_matrix(hidden_states):
        width = hidden_states.shape[1]
        gate_up_proj.check_width(function, "gate_up_proj", width, "hidden_states.shape[1]")
    divisor, inner = (2, "gate_up_proj.shape[1] // 2") if gated else (1, "gate_up_proj.shape[1]")
    intermediate_size, rest = divmod(gate_up_proj.shape[1], divisor)
    # The op itself refuses a rest.
    if not rest:
        down_proj.check_width(function, "down_proj", intermediate_size, inner)
    output: Tensor = _op.overload(
        hidden_states, *gate_up_proj.stored, *down_proj.stored, topk_ids, topk_weights,
        gate_up_bias, down_bias, activation, gated, *others,
    )  # fmt: skip
    return output
