# SPDX-License-Identifier: Apache-2.0
"""Run fused_experts in Triton: allocate, and launch the kernels in order.

Forward: route; multiply by the up projection, with the activation on top; multiply by the down
projection; sum each token's rows. The first GEMM gathers its rows. One tile schedule serves
both where their tiles are as high.

Backward, in two ops. First dh = dY @ down_proj. The activation's backward goes row by row: it makes
dz, the router gradient, and the weighted h in dh's memory. On Hopper one kernel may do both, and
stores no dh. Then comes the gradient of down_proj. z can go now. The second op makes the gradients
of hidden_states and gate_up_proj from dz. In this order few row matrices live at a time.

z is the pre-activation, h the activation's output, dY grad_output, x hidden_states. T num_tokens,
H hidden_size.
"""

from __future__ import annotations

import torch

from moe_ops._triton.activation import Activation, RoutedRows
from moe_ops._triton.compiling import compiled_together
from moe_ops._triton.experts import DownBackward, UpProjection, up_gradients
from moe_ops._triton.projections import plan_down, store_down
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.routing import routing_indices
from moe_ops._triton.rows import in_expert_order, new_rows, sum_parts, sum_rows
from moe_ops._triton.schedule import Rows, expert_offsets
from moe_ops._triton.weight_gradient import grad_bias, grad_weight
from moe_ops.quantization.stored import StoredWeight


@compiled_together
def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor | StoredWeight,
    down_proj: torch.Tensor | StoredWeight,
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
    *,
    for_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    token_counts, gather, scatter = routing_indices(topk_ids, gate_up_proj.shape[0])
    routed = RoutedRows(
        Rows.of(token_counts, gather.shape[0], gather, topk_ids.shape[1]), scatter,
        Activation(activation, activation_limit), gated, interleaved, kernel_config,
    )  # fmt: skip
    num_rows = gather.shape[0]
    before, after = (topk_weights, None) if weights_before else (None, topk_weights)
    stores_z = for_backward and recompute == "none"
    up = UpProjection(routed, hidden_states, gate_up_proj, gate_up_bias, before, stores_z)
    z = None
    if stores_z:
        z = hidden_states.new_empty(num_rows, gate_up_proj.shape[1])
    width = gate_up_proj.shape[1]
    h = new_rows(hidden_states, num_rows, width // 2 if gated else width)
    down = plan_down(routed, h, down_proj, down_bias)
    schedule = up.launch(z, h)
    if isinstance(down, DecodingGemm):
        down.nested_table = up.nested_table
    # The scratch of a quantised weight is freed before the next one is made.
    del up
    y, used = store_down(down, schedule)
    del down  # and with it a scratch, or a copy of the weight, before the output is allocated
    output = sum_rows(y, scatter, after, routed.rows.top_k, used)
    if not for_backward:
        return output
    return output, hidden_states.new_empty(0) if z is None else z, token_counts, gather, scatter


@compiled_together
def fused_experts_down_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_up_proj: torch.Tensor | StoredWeight,
    down_proj: torch.Tensor | StoredWeight,
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
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, ...]:
    grads = [grad_output.new_empty(0) for _ in needs]
    if not any(needs):
        return tuple(grads)
    need_dz, need_down, need_dots, need_bias = needs
    num_rows, top_k = gather_indices.shape[0], topk_weights.shape[1]
    routed = RoutedRows(
        Rows.of(token_counts, num_rows, gather_indices, top_k), scatter_indices,
        Activation(activation, activation_limit), gated, interleaved, kernel_config,
    )  # fmt: skip
    before, after = (topk_weights, None) if weights_before else (None, topk_weights)
    offsets = expert_offsets(token_counts, num_rows)
    down = DownBackward(routed, down_proj, down_bias if need_dots else None, after, offsets)

    # dW and dbias sum over an expert's rows, which are copied into order first. dX gathers its own.
    dy, divisor = grad_output, top_k
    if need_down or need_bias:
        dy, divisor = routed.in_expert_order(grad_output, None), 0
    if need_dz or need_down or need_dots:
        z = pre_activation
        if z is None and hidden_states is not None:
            up = UpProjection(routed, hidden_states, gate_up_proj, gate_up_bias, before, True)
            z = grad_output.new_empty(num_rows, gate_up_proj.shape[1])
            up.launch(z, None)
            del up
        dz, h, dots = down(dy, divisor, z, need_dz, need_down, need_dots)
        del z
        if dz is not None:
            grads[0] = dz
        if h is not None:
            grads[1] = grad_weight(dy, h, offsets, transposed, kernel_config)
        if dots is not None:
            grads[2] = sum_parts(dots, topk_weights)
    if need_bias:
        grads[3] = grad_bias(dy, offsets, after, gather_indices)
    return tuple(grads)


@compiled_together
def fused_experts_up_backward(
    grad_pre_activation: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_up_proj: torch.Tensor | StoredWeight,
    topk_weights: torch.Tensor | None,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor,
    scatter_indices: torch.Tensor,
    top_k: int,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, ...]:
    dz = grad_pre_activation
    grads = [dz.new_empty(0) for _ in needs]
    if not any(needs):
        return tuple(grads)
    need_x, need_up, need_dots, need_bias = needs
    num_rows = gather_indices.shape[0]
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    offsets = expert_offsets(token_counts, num_rows)
    if need_x or need_dots:
        other = hidden_states if need_dots else None
        dx, dots, dz = up_gradients(dz, gate_up_proj, rows, other, need_x, kernel_config)
        if dx is not None:
            grads[0] = sum_rows(dx, scatter_indices, topk_weights, top_k, offsets[1, -1:])
            del dx
        if dots is not None and topk_weights is not None:
            grads[2] = sum_parts(dots, topk_weights)
    if need_up and hidden_states is not None:
        x = in_expert_order(hidden_states, gather_indices, scatter_indices, top_k, topk_weights)
        grads[1] = grad_weight(dz, x, offsets, transposed, kernel_config)
    if need_bias:
        grads[3] = grad_bias(dz, offsets)
    return tuple(grads)
