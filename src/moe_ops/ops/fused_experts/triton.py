# SPDX-License-Identifier: Apache-2.0
"""Run fused_experts in Triton: allocate, and launch the kernels in order.

Forward: route; multiply by the up projection, with the activation on top; multiply by the down
projection; sum each token's rows. The first GEMM gathers its rows. One tile schedule serves both.

Backward, in two ops. First dh = dY @ down_proj. The activation's backward goes row by row: it makes
dz, the router gradient, and the weighted h in dh's memory. On Hopper one kernel may do both, and
stores no dh. Then comes the gradient of down_proj. z can go now. The second op makes the gradients
of hidden_states and gate_up_proj from dz. In this order few row matrices live at a time.

With adapters, a kernel adds the second of the two thin products to what the product with the weight
has stored. So the activation is a kernel of its own. The weights are frozen,
and the backward is one op: no gradient is large, and y is not kept, since the router gradient is
<dh, h>.

z is the pre-activation, h the activation's output, dY grad_output, x hidden_states. T num_tokens,
H hidden_size.
"""

from __future__ import annotations

import torch

from moe_ops._triton.adapter import Adapter
from moe_ops._triton.compiling import compiled_together
from moe_ops._triton.experts import (
    Activation,
    DownBackward,
    RoutedRows,
    UpProjection,
    activate,
)
from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.routing import routing_indices
from moe_ops._triton.rows import gather_rows, in_expert_order, new_rows, sum_parts, sum_rows
from moe_ops._triton.schedule import Rows, TileSchedule, expert_offsets
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
    up = UpProjection(routed, hidden_states, gate_up_proj, gate_up_bias, before)
    z = None
    if for_backward and recompute == "none":
        z = hidden_states.new_empty(num_rows, gate_up_proj.shape[1])
    width = gate_up_proj.shape[1]
    h = new_rows(hidden_states, num_rows, width // 2 if gated else width)
    down = _planned_down(routed, h, down_proj, down_bias)
    schedule = up.launch(z, h)
    if isinstance(down, DecodingGemm):
        down.nested_table = up.nested_table
    # The scratch of a quantised weight is freed before the next one is made.
    del up
    y, used = _down_projection(down, schedule)
    del down  # and with it a scratch, or a copy of the weight, before the output is allocated
    output = sum_rows(y, scatter, after, routed.rows.top_k, used)
    if not for_backward:
        return output
    return output, hidden_states.new_empty(0) if z is None else z, token_counts, gather, scatter


def _planned_down(
    routed: RoutedRows,
    h: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    bias: torch.Tensor | None,
) -> GroupedGemm | DecodingGemm:
    """Plan h @ weight[e].T + bias[e] before h is computed."""
    rows = Rows(routed.rows.token_counts, routed.rows.num_rows)
    return _planned(h, weight, rows, 0, bias, routed.kernel_config, can_describe_y=True)


def _planned(
    x: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    rows: Rows,
    x_divisor: int,
    bias: torch.Tensor | None,
    kernel_config: str | None,
    *,
    can_describe_y: bool | None = None,
) -> GroupedGemm | DecodingGemm:
    """Plan a forward product: it decodes a quantised weight, or reads it in full size."""
    if not isinstance(weight, torch.Tensor):
        decoding = DecodingGemm.where_planned(
            x, weight, rows, kernel_config, x_divisor=x_divisor, bias=bias
        )
        if decoding is not None:
            return decoding
    return GroupedGemm(
        "forward", x, weight, rows,
        x_divisor=x_divisor, bias=bias, can_describe_y=can_describe_y, kernel_config=kernel_config,
    )  # fmt: skip


def _down_projection(
    down: GroupedGemm | DecodingGemm, schedule: TileSchedule | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the product, and how many rows it has; None: all, those of no expert are 0."""
    if isinstance(down, DecodingGemm):
        y = down.x.new_empty(down.rows.num_rows, down.weight.shape[1])
        down.launch(y)
        return y, None
    y = down.new_operand()
    down.launch(y, zeros_tail=False, shared=schedule)
    return y, None if down.schedule is None else down.schedule.used_rows


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
            up = UpProjection(routed, hidden_states, gate_up_proj, gate_up_bias, before)
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
        gemm = GroupedGemm(
            "backward_dX",
            dz,
            gate_up_proj,
            rows,
            has_dots=need_dots,
            can_describe_y=True,
            kernel_config=kernel_config,
        )
        dx = gemm.new_operand() if need_x else None
        dots = gemm.new_dots(has_bias=False) if need_dots else None
        other = hidden_states if need_dots else None
        gemm.launch(dx, other=other, gather_other=True, dots=dots, zeros_tail=False)
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


@compiled_together
def fused_experts_lora(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor | StoredWeight,
    down_proj: torch.Tensor | StoredWeight,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_lora_a: torch.Tensor,
    gate_up_lora_b: torch.Tensor,
    down_lora_a: torch.Tensor,
    down_lora_b: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    kernel_config: str | None = None,
    *,
    for_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    token_counts, gather, scatter = routing_indices(topk_ids, gate_up_proj.shape[0])
    num_rows, top_k = gather.shape[0], topk_ids.shape[1]
    routed = RoutedRows(
        Rows.of(token_counts, num_rows, gather, top_k), scatter,
        Activation(activation, activation_limit), gated, interleaved, kernel_config,
    )  # fmt: skip
    up = Adapter(gate_up_lora_a, gate_up_lora_b)
    down = Adapter(down_lora_a, down_lora_b)
    width = gate_up_proj.shape[1]
    h = new_rows(hidden_states, num_rows, width // 2 if gated else width)
    if up.is_empty:
        low_up = h.new_empty(num_rows, 0)
        z = hidden_states.new_empty(num_rows, width) if for_backward else None
        # The activation is computed on top of the product.
        product = UpProjection(routed, hidden_states, gate_up_proj, gate_up_bias, None)
        schedule = product.launch(z, h)
        del product
    else:
        z, low_up, schedule = _adapted_up(routed, up, hidden_states, gate_up_proj, gate_up_bias, h)
    kept = (z, low_up) if for_backward else ()
    del z, low_up
    y, low_down, used_rows = _adapted_down(routed, down, h, down_proj, down_bias, schedule)
    del h
    output = sum_rows(y, scatter, topk_weights, top_k, used_rows)
    if not for_backward:
        return output
    return output, *kept, low_down, token_counts, gather, scatter


def _adapted_up(
    routed: RoutedRows,
    adapter: Adapter,
    x: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    bias: torch.Tensor | None,
    h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, TileSchedule | None]:
    """Write h, and return z, the adapter's thin product, and the tile schedule if there is one."""
    rows = routed.rows
    product = _planned(x, weight, rows, rows.top_k, bias, routed.kernel_config)
    z = x.new_empty(rows.num_rows, weight.shape[1])
    product.launch(z)
    # Where the product has copied its rows into order, they serve both.
    low = adapter.reduce(product.x, rows, product.x_divisor)
    schedule = product.whole_schedule()
    used_rows = (
        expert_offsets(rows.token_counts, rows.num_rows)[1, -1:]
        if schedule is None
        else schedule.used_rows
    )
    del product  # and with it a scratch
    adapter.add(low, z, rows, schedule)
    activate(routed, z, used_rows, h)
    return z, low, schedule


def _adapted_down(
    routed: RoutedRows,
    adapter: Adapter,
    h: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    bias: torch.Tensor | None,
    schedule: TileSchedule | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return y, the adapter's thin product, and how many rows y has; None: all."""
    rows = Rows(routed.rows.token_counts, routed.rows.num_rows)
    product = _planned_down(routed, h, weight, bias)
    y, used_rows = _down_projection(product, schedule)
    schedule = None if adapter.is_empty else product.whole_schedule()
    del product
    low = adapter.reduce(h, rows)
    adapter.add(low, y, rows, schedule)
    return y, low, used_rows


@compiled_together
def fused_experts_lora_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_up_proj: torch.Tensor | StoredWeight,
    down_proj: torch.Tensor | StoredWeight,
    topk_weights: torch.Tensor,
    gate_up_lora_a: torch.Tensor,
    gate_up_lora_b: torch.Tensor,
    down_lora_a: torch.Tensor,
    down_lora_b: torch.Tensor,
    down_bias: torch.Tensor | None,
    pre_activation: torch.Tensor,
    gate_up_low_rank: torch.Tensor | None,
    down_low_rank: torch.Tensor | None,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor,
    scatter_indices: torch.Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    activation_limit: float | None,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, ...]:
    grads = [grad_output.new_empty(0) for _ in needs]
    need_x, need_weights, need_up_a, need_up_b, need_down_a, need_down_b = needs
    need_dz = need_x or need_up_a or need_up_b
    num_rows, top_k = gather_indices.shape[0], topk_weights.shape[1]
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    routed = RoutedRows(
        rows, scatter_indices, Activation(activation, activation_limit), gated, interleaved,
        kernel_config,
    )  # fmt: skip
    up_adapter = Adapter(gate_up_lora_a, gate_up_lora_b)
    down_adapter = Adapter(down_lora_a, down_lora_b)
    offsets = expert_offsets(token_counts, num_rows)

    dy, divisor = grad_output, top_k
    if need_down_b:
        assert down_low_rank is not None  # the schema's `where` says so
        # A sum over an expert's rows needs them in order, and then they serve all products.
        dy, divisor = routed.in_expert_order(grad_output, None), 0
        weighted = gather_rows(down_low_rank, rows.gather, topk_weights, top_k)
        grads[5] = grad_weight(dy, weighted, offsets, False)
    dz = None
    if need_dz or need_weights or need_down_a:
        low_down = down_adapter.reduce_gradient(dy, rows, divisor)
        down = DownBackward(
            routed, down_proj, down_bias if need_weights else None, topk_weights, offsets,
            None if down_adapter.is_empty else down_adapter, low_down,
        )  # fmt: skip
        dz, h, dots = down(dy, divisor, pre_activation, need_dz, need_down_a, need_weights)
        if h is not None:
            grads[4] = grad_weight(low_down, h, offsets, False)
        if dots is not None:
            grads[1] = sum_parts(dots, topk_weights)
        del h
    del dy
    if dz is None:
        return tuple(grads)
    if need_x or need_up_a:
        low_up = up_adapter.reduce_gradient(dz, rows)
    if need_x:
        product = GroupedGemm(
            "backward_dX", dz, gate_up_proj, rows, can_describe_y=True, kernel_config=kernel_config
        )
        dx = product.new_operand()
        product.launch(dx, zeros_tail=False)
        schedule = None if up_adapter.is_empty else product.whole_schedule()
        del product
        up_adapter.add_gradient(low_up, dx, rows, schedule)
        grads[0] = sum_rows(dx, scatter_indices, None, top_k, offsets[1, -1:])
        del dx
    if need_up_a:
        assert hidden_states is not None
        x = routed.in_expert_order(hidden_states, None)
        grads[2] = grad_weight(low_up, x, offsets, False)
    if need_up_b:
        assert gate_up_low_rank is not None
        grads[3] = grad_weight(dz, gate_up_low_rank, offsets, False)
    return tuple(grads)
