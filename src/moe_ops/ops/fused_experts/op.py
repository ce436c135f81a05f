# SPDX-License-Identifier: Apache-2.0
"""Register fused_experts: a whole layer of experts, from hidden states to hidden states.

If a gradient is recorded, fused_experts_forward runs in its place and also returns what the
backward needs. Without a gradient none of that is kept.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented, is_transposed
from moe_ops.ops.fused_experts import pytorch

_op = Op("fused_experts")
_op.implement("pytorch", pytorch.fused_experts, for_backward=False)
_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts", for_backward=False)

_forward_op = Op("fused_experts_forward")
_forward_op.implement("pytorch", pytorch.fused_experts, for_backward=True)
_forward_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts", for_backward=True)

_backward_op = Op("fused_experts_backward")
_backward_op.implement("pytorch", pytorch.fused_experts_backward)
_backward_op.implement("triton", "moe_ops.ops.fused_experts.triton:fused_experts_backward")


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    hidden_states, gate_up_proj, down_proj, _, topk_weights, gate_up_bias, down_bias, *flags = args
    *activation, weights_before, recompute, config = flags
    _, pre_activation, *routing = outputs
    need_x, need_up, need_down, _, need_weights, need_up_bias, need_down_bias, *_ = ctx.needs
    # Of these gradients only down_bias's does not go through the activation.
    reads_activation = need_x or need_up or need_down or need_weights or need_up_bias
    recomputes = reads_activation and recompute == "pre_activation"
    reads_hidden_states = need_up or (need_weights and weights_before) or recomputes
    # Inputs of the pre-activation that need a gradient are kept, even if the backward does not read
    # them. From them the backward op sees that somebody asks for a second derivative.
    ctx.save_for_backward(
        hidden_states if reads_hidden_states or need_x else None,
        gate_up_proj,
        down_proj,
        topk_weights,
        gate_up_bias if recomputes or need_up_bias else None,
        down_bias if need_weights and not weights_before else None,
        pre_activation if reads_activation and not recomputes else None,
        *routing,
    )
    needs = [need_x, need_up, need_down, need_weights, need_up_bias, need_down_bias]
    transposed = [is_transposed(gate_up_proj), is_transposed(down_proj)]
    ctx.flags = (*activation, weights_before, needs, transposed, config)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = _backward_op.overload(grad_output, *ctx.saved_tensors, *ctx.flags)
    x, gate_up, down, weights, gate_up_bias, down_bias = grads
    return x, gate_up, down, None, weights, gate_up_bias, down_bias


_op.differentiate(_save, _backward, forward=_forward_op)


@documented
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
    return _op.overload(
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_ids,
        topk_weights,
        gate_up_bias,
        down_bias,
        activation,
        gated,
        interleaved,
        activation_limit,
        weights_before,
        recompute,
        kernel_config,
    )
