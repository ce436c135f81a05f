# SPDX-License-Identifier: Apache-2.0
"""Run fused_experts_lora in Triton: allocate, and launch the kernels in order.

As in fused_experts, but a kernel adds the second of an adapter's two thin products to what the
product with the weight has stored. So the activation is a kernel of its own. The weights are frozen,
and the backward is one op: no gradient is large, and y is not kept, since the router gradient is
<dh, h>.

z is the pre-activation, h the activation's output, y the down projection's; dY is grad_output, x
hidden_states, and low are an adapter's first thin products.
"""

from __future__ import annotations

import torch

from moe_ops._triton.activation import Activation, RoutedRows, activate
from moe_ops._triton.adapter import Adapter
from moe_ops._triton.compiling import compiled_together
from moe_ops._triton.experts import DownBackward, UpProjection
from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.projections import plan_down, plan_projection, store_down
from moe_ops._triton.routing import routing_indices
from moe_ops._triton.rows import gather_rows, new_rows, sum_parts, sum_rows
from moe_ops._triton.schedule import Rows, TileSchedule, expert_offsets
from moe_ops._triton.weight_gradient import grad_weight
from moe_ops.quantization.stored import StoredWeight


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
        product = UpProjection(
            routed, hidden_states, gate_up_proj, gate_up_bias, None, for_backward
        )
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
    product = plan_projection(x, weight, rows, rows.top_k, bias, routed.kernel_config)
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
    product = plan_down(routed, h, weight, bias)
    y, used_rows = store_down(product, schedule)
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
