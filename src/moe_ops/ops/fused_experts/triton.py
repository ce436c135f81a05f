# SPDX-License-Identifier: Apache-2.0
"""fused_experts in Triton: which kernels, in which order, and what is allocated for them.

Forward: route, multiply by the up projection with the activation on top (rows are gathered in the
GEMM), multiply by the down projection, sum each token's rows. One tile schedule serves both GEMMs.

Backward: dh = dY @ down_proj; the activation's backward, row by row, makes dz, the weighted h in
dh's place and the router gradient (one kernel does both on Hopper, and stores no dh); then the
gradients of down_proj, hidden_states and gate_up_proj, in this order, so that few row matrices live
at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime.errors import OutOfResources

from moe_ops._triton import hopper
from moe_ops._triton.gemm import (
    GroupedGemm,
    TileSchedule,
    expert_offsets,
    grad_bias,
    grad_weight,
    refuse_too_large,
)
from moe_ops._triton.launch import Activation, cdiv, launch_on, next_power_of_2, strides
from moe_ops._triton.rows import copy_rows, gather_rows, sum_rows
from moe_ops.ops.fused_experts.kernels import _expert_activation_bwd_kernel, _expert_up_kernel


@dataclass(frozen=True)
class RoutedRows:
    """The routed rows: which there are, and what becomes of z in each."""

    token_counts: torch.Tensor
    gather_indices: torch.Tensor
    scatter_indices: torch.Tensor
    top_k: int
    activation: Activation
    gated: bool
    interleaved: bool
    kernel_config: str | None

    @property
    def number(self) -> int:
        """R: slots, those of no expert too."""
        return self.gather_indices.shape[0]

    @property
    def has_halves(self) -> bool:
        """Whether gate and up are the halves of z."""
        return self.gated and not self.interleaved


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
    acts = Activation(activation, activation_limit)
    rows = _route(topk_ids, gate_up_proj, acts, gated, interleaved, kernel_config)
    tensors = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    return _forward(rows, *tensors, weights_before, None)


def fused_experts_forward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    acts = Activation(activation, activation_limit)
    rows = _route(topk_ids, gate_up_proj, acts, gated, interleaved, kernel_config)
    pre_activation, stored = hidden_states.new_empty(0), None
    if recompute == "none":
        pre_activation = stored = hidden_states.new_empty(rows.number, gate_up_proj.shape[1])
    tensors = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    output = _forward(rows, *tensors, weights_before, stored)
    return output, pre_activation, rows.token_counts, rows.gather_indices, rows.scatter_indices


def fused_experts_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor | None,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
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
    transposed: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, ...]:
    grads = [grad_output.new_empty(0) for _ in needs]
    if not any(needs):
        return tuple(grads)
    need_x, need_up, need_down, need_weights, need_up_bias, need_down_bias = needs
    need_dots, need_dx_dots = need_weights and not weights_before, need_weights and weights_before
    need_dz = need_x or need_up or need_up_bias or need_dx_dots
    rows = RoutedRows(
        token_counts, gather_indices.contiguous(), scatter_indices, topk_weights.shape[1],
        Activation(activation, activation_limit), gated, interleaved, kernel_config,
    )  # fmt: skip
    before, after = (topk_weights, None) if weights_before else (None, topk_weights)
    offsets = expert_offsets(token_counts, rows.number)
    down = Down(rows, down_proj, down_bias if need_dots else None, after, offsets)

    # What contracts over an expert's rows has them moved before it; a GEMM alone gathers them.
    dy, divisor = grad_output, rows.top_k
    if need_down or need_down_bias:
        dy, divisor = copy_rows(grad_output, scatter_indices, rows.top_k), 0
    dz = h = dots = None
    if need_dz or need_down or need_dots:
        z = pre_activation
        if z is None and hidden_states is not None:
            z = grad_output.new_empty(rows.number, gate_up_proj.shape[1])
            up_projection(rows, hidden_states, gate_up_proj, gate_up_bias, before, z, None)
        dz, h, dots = down.backward(dy, divisor, z, need_dz, need_down, need_dots)
        del z
    if need_down and h is not None:
        grads[2] = grad_weight(dy, h, offsets, transposed[1], kernel_config)
    if need_down_bias:
        grads[5] = grad_bias(dy, offsets, after, rows.gather_indices)
    del dy, h
    if dz is not None:
        if need_x or need_dx_dots:
            x = hidden_states if need_dx_dots else None
            grads[0], dx_dots = _grad_input(rows, dz, gate_up_proj, x, before, offsets, need_x)
            dots = dx_dots if need_dx_dots else dots
        if need_up and hidden_states is not None:
            x = _expert_rows(rows, hidden_states, before)
            grads[1] = grad_weight(dz, x, offsets, transposed[0], kernel_config)
        if need_up_bias:
            grads[4] = grad_bias(dz, offsets)
    if dots is not None:
        grads[3] = dots.sum(0).view(topk_weights.shape).to(topk_weights.dtype)
    return tuple(grads)


def _route(
    topk_ids: torch.Tensor,
    gate_up_proj: torch.Tensor,
    activation: Activation,
    gated: bool,
    interleaved: bool,
    kernel_config: str | None,
) -> RoutedRows:
    counts, gather, scatter = torch.ops.moe.routing_indices(topk_ids, gate_up_proj.shape[0])
    top_k = topk_ids.shape[1]
    return RoutedRows(counts, gather, scatter, top_k, activation, gated, interleaved, kernel_config)


def _forward(
    rows: RoutedRows,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    weights_before: bool,
    z: torch.Tensor | None,
) -> torch.Tensor:
    before, after = (topk_weights, None) if weights_before else (None, topk_weights)
    h = hidden_states.new_empty(rows.number, down_proj.shape[2])
    schedule = up_projection(rows, hidden_states, gate_up_proj, gate_up_bias, before, z, h)
    gemm = GroupedGemm(
        "forward",
        x=h,
        b=down_proj.transpose(1, 2),
        token_counts=rows.token_counts,
        num_rows=rows.number,
        has_bias=down_bias is not None,
        kernel_config=rows.kernel_config,
    )
    y = hidden_states.new_empty(rows.number, down_proj.shape[1])
    gemm.launch(y, bias=down_bias, zeros_tail=False, shared=schedule)
    used = None if gemm.schedule is None else gemm.schedule.used_rows
    return sum_rows(y, rows.scatter_indices, after, rows.top_k, used)


def _expert_rows(rows: RoutedRows, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The rows of x in expert order, (R, H), each times its slot's weight where given."""
    if weights is None:
        return copy_rows(x, rows.scatter_indices, rows.top_k)
    return gather_rows(x, rows.gather_indices, weights, rows.top_k, rows.top_k)


def up_projection(
    rows: RoutedRows,
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    z: torch.Tensor | None,
    h: torch.Tensor | None,
) -> TileSchedule | None:
    """Writes z, zeros in the rows of no expert, and h = act(z); returns the schedule it went by."""
    divisor = rows.top_k
    if weights is not None:
        x, divisor = _expert_rows(rows, x, weights), 0
    gemm = GroupedGemm(
        "forward",
        x=x,
        b=gate_up_proj.transpose(1, 2),
        token_counts=rows.token_counts,
        num_rows=rows.number,
        gather=rows.gather_indices,
        x_divisor=divisor,
        has_bias=bias is not None,
        flags=("gated",) if rows.gated else ("activated",),
        kernel_config=rows.kernel_config,
    )
    if gemm.is_empty:
        return None
    gemm.make_schedule(z)
    if rows.gated and _up_on_hopper(rows, gemm, x, divisor, bias, z, h):
        return gemm.schedule
    width = gemm.n // 2 if rows.gated else gemm.n
    block_m, block_n = gemm.tiling.block_m, gemm.tiling.block_n
    block_i = block_n // 2 if rows.gated else block_n
    subtile = gemm.tiling.config.epilogue_subtile
    halves = rows.has_halves
    x_desc, b_desc = gemm.describe_operands(block_m, halves)
    z_desc = h_desc = None
    if z is not None:
        parts = 2 if halves else 1
        columns = block_i if rows.gated else block_i // subtile
        described = z.unflatten(1, (parts, gemm.n // parts))
        z_desc = gemm.describe_rows(described, (block_m, 1, columns))
    if h is not None:
        h_desc = gemm.describe_rows(h.unsqueeze(1), (block_m, 1, block_i // subtile))
    try:
        with launch_on(x):
            _expert_up_kernel[(gemm.programs,)](
                x, x_desc, gemm.b, b_desc, bias, gemm.gather, z, z_desc, h, h_desc,
                *gemm.tile_arguments(), width, gemm.k, max(divisor, 1), rows.activation.bound,
                *x.stride(), *gemm.b.stride(), *strides(bias),
                TMA_Z=z_desc is not None, TMA_H=h_desc is not None, GATED=rows.gated,
                INTERLEAVED=rows.interleaved, STORE_Z=z is not None, STORE_H=h is not None,
                **rows.activation.options, **gemm.options(x_desc, b_desc, bias),
            )  # fmt: skip
    except OutOfResources as error:
        refuse_too_large(error, rows.kernel_config)
    return gemm.schedule


def _up_on_hopper(
    rows: RoutedRows,
    gemm: GroupedGemm,
    x: torch.Tensor,
    divisor: int,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    h: torch.Tensor | None,
) -> bool:
    """Launches the kernel of _triton/kernels/hopper_experts.py, where that is asked for and can be.

    It does not gather: where the product is long, its gain pays for rows that are copied before it.
    """
    scheduled = gemm.tiles_for_hopper()
    if scheduled is None:
        return False
    try:
        return hopper.expert_up(
            x, rows.scatter_indices, divisor, gemm.b, bias, z, h, scheduled, rows.activation,
            rows.interleaved,
        )  # fmt: skip
    except OutOfResources as error:
        refuse_too_large(error, rows.kernel_config)


@dataclass(frozen=True)
class Down:
    """The down projection's way back: from dY to the gradient of the pre-activation."""

    rows: RoutedRows
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    offsets: torch.Tensor

    def backward(
        self,
        dy: torch.Tensor,
        divisor: int,
        z: torch.Tensor | None,
        need_dz: bool,
        need_h: bool,
        need_dots: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dz, the weighted h, and the router gradient's parts (any number, R), in slot order."""
        rows = self.rows
        dz = z.new_empty(z.shape) if need_dz and z is not None else None
        h = dy.new_empty(rows.number, self.weight.shape[2]) if need_h else None
        if not need_dz and not need_dots:
            self._activation_backward(None, z, dz, h, None)
            return dz, h, None
        # The kernel for Hopper makes dz as it multiplies, of rows that lie in place.
        may_be_at_once = (
            rows.has_halves
            and dz is not None
            and divisor == 0
            and hopper.has_down_backward(dy, rows.activation)
        )
        gemm = GroupedGemm(
            "backward_dX",
            x=dy,
            b=self.weight,
            token_counts=rows.token_counts,
            num_rows=rows.number,
            gather=rows.gather_indices,
            x_divisor=divisor,
            needs_schedule=need_dots and self.bias is not None,
            flags=("gated",) if may_be_at_once else (),
            kernel_config=rows.kernel_config,
        )
        tiling = gemm.tiling
        at_once = may_be_at_once and tiling.is_specialized and tiling.config.is_in_turns
        dots = None
        if need_dots:
            shape = ((gemm.tiles_n if at_once else 1) + (self.bias is not None), rows.number)
            dots = torch.zeros(shape, dtype=torch.float32, device=dy.device)
        if z is None or dz is None or not (at_once and self._at_once(gemm, z, dz, h, dots)):
            dh = dy.new_empty(rows.number, self.weight.shape[2]) if h is None else h
            # Where descriptors could not describe the operands, the schedule has been made, and dots
            # has a row for each column tile: what follows writes the first, the others stay zeros.
            gemm.launch(dh, zeros_tail=False, shared=gemm.schedule)
            self._activation_backward(dh, z, dz, h, dots)
        if dots is not None and self.bias is not None:
            gemm.launch_bias_dots(self.bias, dots[-1])
        return dz, h, dots

    def _at_once(
        self,
        gemm: GroupedGemm,
        z: torch.Tensor,
        dz: torch.Tensor,
        h: torch.Tensor | None,
        dots: torch.Tensor | None,
    ) -> bool:
        """Launches the kernel that does without dh, where it can be; dots are of column tiles."""
        if gemm.is_empty:
            return False
        gemm.make_schedule()
        rows, scheduled = self.rows, gemm.tiles_for_hopper()
        try:
            return scheduled is not None and hopper.expert_down_backward(
                gemm.x, gemm.b, z, dz, h, dots, self.scale, rows.gather_indices, rows.top_k,
                scheduled, rows.activation,
            )  # fmt: skip
        except OutOfResources as error:
            refuse_too_large(error, rows.kernel_config)

    def _activation_backward(
        self,
        dh: torch.Tensor | None,
        z: torch.Tensor | None,
        dz: torch.Tensor | None,
        h: torch.Tensor | None,
        dots: torch.Tensor | None,
    ) -> None:
        """What _expert_activation_bwd_kernel makes of dh, where there is any; h may be dh."""
        if z is None or z.numel() == 0:
            return
        rows, scale = self.rows, self.scale
        width = self.weight.shape[2]
        block_rows, block_i, warps = _activation_block(width)
        z = z.contiguous()
        with launch_on(z):
            _expert_activation_bwd_kernel[(cdiv(rows.number, block_rows),)](
                dh, z, scale, rows.gather_indices, self.offsets[1, -1:], dz, h, dots,
                rows.number, width, rows.top_k, rows.activation.bound, *strides(scale),
                ROWS=block_rows, BLOCK_I=block_i, GATED=rows.gated, INTERLEAVED=rows.interleaved,
                HAS_SCALE=scale is not None, LOAD_DH=dh is not None, STORE_DZ=dz is not None,
                STORE_H=h is not None, STORE_DOTS=dots is not None, num_warps=warps,
                **rows.activation.options,
            )  # fmt: skip


def _activation_block(width: int) -> tuple[int, int, int]:
    """Rows and columns of a block of the activation's backward, and its warps.

    It is bound by memory: a thread has 8 to 16 numbers, and little of a block is past the width.
    """
    for columns in (2048, 1024, 512):
        if cdiv(width, columns) * columns <= 1.1 * width:
            return max(1, 1024 // columns), columns, 2 if width <= min(columns, 1024) else 4
    columns = min(256, next_power_of_2(width))
    return min(16, 1024 // columns), columns, 4


def _grad_input(
    rows: RoutedRows,
    dz: torch.Tensor,
    gate_up_proj: torch.Tensor,
    x: torch.Tensor | None,
    weights: torch.Tensor | None,
    offsets: torch.Tensor,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of hidden_states (T, H), and where x is given <dx, x> of each slot, in parts."""
    gemm = GroupedGemm(
        "backward_dX",
        x=dz,
        b=gate_up_proj,
        token_counts=rows.token_counts,
        num_rows=rows.number,
        gather=rows.gather_indices,
        top_k=rows.top_k,
        has_dots=x is not None,
        kernel_config=rows.kernel_config,
    )
    dx = dz.new_empty(rows.number, gate_up_proj.shape[2]) if need_x else None
    dots = None if x is None else gemm.new_dots(False)
    gemm.launch(dx, other=x, gather_other=True, dots=dots, zeros_tail=False)
    if dx is None:
        return dz.new_empty(0), dots
    return sum_rows(dx, rows.scatter_indices, weights, rows.top_k, offsets[1, -1:]), dots
