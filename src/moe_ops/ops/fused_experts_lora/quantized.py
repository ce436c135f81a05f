# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts_lora_quantized and its gradient: fused_experts_lora's, with stored weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops._core.checks import is_matrix
from moe_ops._core.library import Op, function_of
from moe_ops.ops.fused_experts_lora.op import kept_for_backward
from moe_ops.quantization.stored import NUM_STORED, StoredWeight
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("fused_experts_lora_quantized")
_forward_op = Op("fused_experts_lora_quantized_forward")
_backward_op = Op("fused_experts_lora_quantized_backward")


def fused_experts_lora_quantized(
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
    by: str,
    for_backward: bool,
) -> Any:
    """Compute fused_experts_lora with the function of `by`: pytorch or triton."""
    gate_up_proj = StoredWeight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding, gate_up_lora_a.shape[2],
    )  # fmt: skip
    down_proj = StoredWeight(
        down_codes, down_scale, down_nested_scale, down_nested_offset,
        down_format, down_group_size, down_scale_encoding, down_lora_a.shape[2],
    )  # fmt: skip
    return function_of(f"moe_ops.ops.fused_experts_lora.{by}:fused_experts_lora")(
        hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, gate_up_lora_a,
        gate_up_lora_b, down_lora_a, down_lora_b, gate_up_bias,
        down_bias, activation, gated, interleaved, activation_limit, kernel_config,
        for_backward=for_backward,
    )  # fmt: skip


def fused_experts_lora_quantized_backward(
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
    *,
    by: str,
) -> tuple[Tensor, ...]:
    """Compute fused_experts_lora_backward with the function of `by`."""
    gate_up_proj = StoredWeight(
        gate_up_codes, gate_up_scale, gate_up_nested_scale, gate_up_nested_offset,
        gate_up_format, gate_up_group_size, gate_up_scale_encoding, gate_up_lora_a.shape[2],
    )  # fmt: skip
    down_proj = StoredWeight(
        down_codes, down_scale, down_nested_scale, down_nested_offset,
        down_format, down_group_size, down_scale_encoding, down_lora_a.shape[2],
    )  # fmt: skip
    function = function_of(f"moe_ops.ops.fused_experts_lora.{by}:fused_experts_lora_backward")
    grads: tuple[Tensor, ...] = function(
        grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_lora_a,
        gate_up_lora_b, down_lora_a, down_lora_b, down_bias,
        pre_activation, gate_up_low_rank, down_low_rank, token_counts, gather_indices,
        scatter_indices, activation, gated, interleaved, activation_limit, needs, kernel_config,
    )  # fmt: skip
    return grads


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
    up, down, (x, *others) = tensors[:4], tensors[4:8], tensors[8:]
    up_layout, down_layout = ctx.layouts
    grad_x, grad_weights, *grad_factors = _backward_op.in_backward(
        grad_output, x, *up, *up_layout, *down, *down_layout, *others, *ctx.activation, ctx.wanted,
        ctx.config,
    )  # fmt: skip
    return grad_x, *[None] * (2 * NUM_STORED + 1), grad_weights, *grad_factors


_op.differentiate(_save, _backward, forward=_forward_op)


def adapted_quantized_experts(
    hidden_states: Tensor,
    gate_up_proj: QuantizedWeight,
    down_proj: QuantizedWeight,
    *others: Any,
) -> Tensor:
    """Call the op, with the arguments of fused_experts_lora in order.

    Raises:
        ValueError: gate_up_proj has another width. The op would tell those of packed codes.
    """
    # Other rows the op itself refuses.
    if is_matrix(hidden_states):
        width = hidden_states.shape[1]
        gate_up_proj.check_width(
            "moe::fused_experts_lora", "gate_up_proj", width, "hidden_states.shape[1]"
        )
    output: Tensor = _op.overload(hidden_states, *gate_up_proj.stored, *down_proj.stored, *others)
    return output
