# SPDX-License-Identifier: Apache-2.0
"""Launch the two products of an expert layer that have an activation on top.

The up projection computes z = x @ gate_up_proj[e].T + bias[e] and h = act(gate) * up. The down
projection's backward computes dh = dY @ down_proj[e]. From dh it makes the gradient of z, the
weighted h and the router gradient. On Hopper one ping-pong kernel may do all of either.

T num_tokens, K top_k, R = T * K routed rows in expert order, E num_experts, H hidden_size,
I intermediate_size (width), U columns of z: 2 * I with a gate, else I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ops._triton.activation import RoutedRows, launch_activation
from moe_ops._triton.adapter import Adapter
from moe_ops._triton.descriptors import (
    can_describe,
    can_describe_rows,
    describe,
    describe_for_gluon,
)
from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.hopper import describe_b, describe_parts, kernels
from moe_ops._triton.kernels.experts import _expert_up_kernel
from moe_ops._triton.launch import launch, strides
from moe_ops._triton.plan import PERSISTENT
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.rows import new_rows
from moe_ops._triton.schedule import Rows, TileSchedule
from moe_ops.configs.device import device_of
from moe_ops.configs.footprint import epilogue_columns, epilogue_slots
from moe_ops.configs.specialize import asks_for_backward
from moe_ops.quantization.stored import StoredWeight


class UpProjection:
    """The up projection of routed rows, planned when it is made.

    Args:
        routed: the rows.
        x ((T, H)): rows in token order.
        gate_up_proj ((E, U, H)): the up projection, in any strides or quantised.
        bias ((E, U)): its bias.
        weights ((T, K)): router weights that multiply the rows before the product.
        stores_z: whether `launch` is given a z.
    """

    def __init__(
        self,
        routed: RoutedRows,
        x: torch.Tensor,
        gate_up_proj: torch.Tensor | StoredWeight,
        bias: torch.Tensor | None,
        weights: torch.Tensor | None,
        stores_z: bool,
    ) -> None:
        self.routed, self.weights = routed, weights
        # Weighted rows are moved into expert order before the product.
        divisor = routed.rows.top_k if weights is None else 0
        self.product: GroupedGemm | DecodingGemm
        if not isinstance(gate_up_proj, torch.Tensor):
            decoding = DecodingGemm.where_planned(
                x, gate_up_proj, routed.rows, routed.kernel_config, x_divisor=divisor, bias=bias,
                gated=routed.gated, interleaved=routed.interleaved,
            )  # fmt: skip
            if decoding is not None:
                self.product = decoding
                return
        width = gate_up_proj.shape[1] // 2 if routed.gated else gate_up_proj.shape[1]
        self.product = GroupedGemm(
            "forward",
            x,
            gate_up_proj,
            routed.rows,
            x_divisor=divisor,
            bias=bias,
            epilogue="gated_activation" if routed.gated else "activation",
            # Rows that are moved lie where TMA can describe them.
            can_describe_x=can_describe_rows(x.shape[1], x.dtype)
            or (weights is not None and x.shape[1] > 0),
            # The rows of h begin at sectors, those of z do not. With a bias that would take another
            # kernel, which adds it at another time: h would depend on whether z is stored.
            can_describe_y=(not stores_z and bias is None) or can_describe_rows(width, x.dtype),
            kernel_config=routed.kernel_config,
        )

    @property
    def nested_table(self) -> torch.Tensor | None:
        """Return the table of nested scales that its launch has written, if it has."""
        product = self.product
        return product.nested_table if isinstance(product, DecodingGemm) else None

    def launch(self, z: torch.Tensor | None, h: torch.Tensor | None) -> TileSchedule | None:
        """Write z and h = act(z), and return the tile schedule of the product if it has one.

        Rows of no expert are zeros in z, and are not written in h.

        Args:
            z ((R, U)): where the pre-activation is stored; None: it is not.
            h ((R, I)): where the activation's output is stored; None: it is not.
        """
        product, routed = self.product, self.routed
        if routed.rows.is_empty:
            return None
        if isinstance(product, DecodingGemm):
            if self.weights is not None:
                product.x = routed.in_expert_order(product.x, self.weights)
            activation = routed.activation
            product.launch(h, z=z, activation=activation.name, limit=activation.limit)
            return None
        if self.weights is not None or (product.plan.copied.x and product.x_divisor):
            product.own_x(routed.in_expert_order(product.x, self.weights))
        for _ in product.parts(z):
            if product.plan.kernel == PERSISTENT:
                _up_persistent(product, routed, z, h)
            else:
                _up_pingpong(product, routed, z, h)
        return product.schedule if product.num_parts == 1 else None


def _up_persistent(
    gemm: GroupedGemm, routed: RoutedRows, z: torch.Tensor | None, h: torch.Tensor | None
) -> None:
    plan, x, bias = gemm.plan, gemm.x, gemm.bias
    block_m, block_n, _ = plan.tile
    width, block_i = (gemm.n // 2, block_n // 2) if routed.gated else (gemm.n, block_n)
    subtile, halves = plan.config.epilogue_subtile, routed.has_halves
    x_desc, b_desc = gemm.describe_operands(block_m, halves)
    z_desc = h_desc = None
    if z is not None and plan.tma.y:
        parts = 2 if halves else 1
        columns = block_i if routed.gated else block_i // subtile
        z_parts = z.unflatten(1, (parts, gemm.n // parts))
        z_desc = describe(z_parts, (block_m, 1, columns), ragged=True)
    if h is not None and plan.tma.y:
        h_desc = describe(h.unsqueeze(1), (block_m, 1, block_i // subtile), ragged=True)
    launch(
        _expert_up_kernel, (gemm.programs,),
        x, x_desc, gemm.b, b_desc, bias, gemm.rows.gather, z, z_desc, h, h_desc,
        *gemm.tile_arguments(), width, gemm.k, max(gemm.x_divisor, 1), routed.activation.bound,
        *x.stride(), *gemm.b.stride(), *strides(bias), strides(h)[0],
        HAS_BIAS=bias is not None, TMA_Z=z_desc is not None, TMA_H=h_desc is not None,
        GATED=routed.gated, INTERLEAVED=routed.interleaved, STORE_Z=z is not None,
        STORE_H=h is not None, **routed.activation.options, **gemm.options(),
        on=x, kernel_config=gemm.kernel_config,
    )  # fmt: skip


def _up_pingpong(
    gemm: GroupedGemm, routed: RoutedRows, z: torch.Tensor | None, h: torch.Tensor | None
) -> None:
    """Do the same with the ping-pong kernel of Hopper, on rows in expert order."""
    plan, schedule, b, bias = gemm.plan, gemm.schedule, gemm.b, gemm.bias
    assert schedule is not None  # such high tiles always come from a schedule
    block_m, block_n, block_k = plan.tile
    width, block_i = gemm.n // 2, block_n // 2
    columns = block_i // plan.config.epilogue_subtile
    b_desc = describe_b(b, block_n, block_k, halves=not routed.interleaved)
    z_width = gemm.n if routed.interleaved else width
    z_desc = None if z is None else describe_parts(z, z_width, block_m, columns)
    h_desc = None if h is None else describe_parts(h, width, block_m, columns)
    x = gemm.x
    launch(
        kernels().experts.expert_up_pingpong_kernel, (gemm.programs,),
        # The kernel reads the dtype of an unused descriptor too: it gets the other one.
        describe_for_gluon(x, (block_m, block_k)), b_desc, bias, z_desc or h_desc,
        h_desc or z_desc, schedule.tiles, schedule.max_tiles, width, gemm.k,
        routed.activation.bound, *strides(bias),
        HAS_BIAS=bias is not None, INTERLEAVED=routed.interleaved, STORE_Z=z is not None,
        STORE_H=h is not None, **routed.activation.options, **plan.options,
        on=x, kernel_config=gemm.kernel_config,
    )  # fmt: skip


@dataclass(slots=True)
class DownBackward:
    """Run the down projection's backward: from dY to the gradient of the pre-activation.

    Attributes:
        routed: the rows.
        weight ((E, H, I)): the down projection, in any strides or quantised.
        bias ((E, H)): its bias, if the router gradient needs it.
        scale ((T, K)): router weights that multiply the rows after the product.
        offsets ((2, E), int32): the first row and the end row of each expert.
        adapter: that of the weight, if it has one.
        low_rank ((R, L)): Adapter.reduce_gradient of dY, where there is an adapter.
    """

    routed: RoutedRows
    weight: torch.Tensor | StoredWeight
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    offsets: torch.Tensor
    adapter: Adapter | None = None
    low_rank: torch.Tensor | None = None

    def __call__(
        self,
        dy: torch.Tensor,
        divisor: int,
        z: torch.Tensor | None,
        need_dz: bool,
        need_h: bool,
        need_dots: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return dz, the weighted h, and parts of the router gradient, (any number, R) by slot.

        Rows of no expert are zeros in dz, and are not written in h.

        Args:
            dy: dY, in expert order if the divisor is 0, else in token order.
            divisor: GroupedGemm.x_divisor.
            z ((R, U)): the pre-activation.
            need_dz: whether dz is needed.
            need_h: whether the weighted h is needed.
            need_dots: whether the router gradient is needed.
        """
        rows, width = self.routed.rows, self.weight.shape[2]
        need_dz = need_dz and z is not None
        if not need_dz and not need_dots:
            h = new_rows(dy, rows.num_rows, width) if need_h else None
            self._activation_backward(None, z, None, h, None)
            return None, h, None
        gemm = self._plan(dy, divisor, z if need_dz else None, need_dots)
        at_once = gemm.plan.computes_epilogue
        dz = z.new_empty(z.shape) if need_dz and z is not None else None
        h = gemm.new_operand() if need_h else None
        dots = self._new_dots(gemm.tiles_n if at_once else 0) if need_dots else None
        if at_once and not rows.is_empty:
            assert z is not None
            assert dz is not None
            for _ in gemm.parts(dz):
                self._pingpong(gemm, z, dz, h, dots)
        else:
            dh = gemm.new_operand() if h is None else h
            gemm.launch(dh, zeros_tail=False)
            if self.adapter is not None and self.low_rank is not None:
                self.adapter.add_gradient(self.low_rank, dh, rows, gemm.whole_schedule())
            self._activation_backward(dh, z, dz, h, dots)
        if dots is not None and self.bias is not None:
            gemm.launch_bias_dots(self.bias, dots[-1])
        return dz, h, dots

    def _new_dots(self, tiles: int) -> torch.Tensor:
        """Return room for the parts of the router gradient: one for each column tile, or for all.

        The last one is the bias's. With 0 tiles the activation's backward makes the only part.
        """
        rows, device = self.routed.rows, self.offsets.device
        if not tiles and self.bias is None and self.scale is not None and not rows.is_empty:
            # That kernel writes every slot, so this is the gradient itself.
            return torch.empty(1, rows.num_rows, dtype=self.scale.dtype, device=device)
        parts = max(tiles, 1) + (self.bias is not None)
        return torch.zeros(parts, rows.num_rows, dtype=torch.float32, device=device)

    def _plan(
        self,
        dy: torch.Tensor,
        divisor: int,
        z: torch.Tensor | None,
        need_dots: bool,
    ) -> GroupedGemm:
        """Plan the product; z is None if dz is not needed."""
        routed, width = self.routed, self.weight.shape[2]
        may_be_at_once = (
            routed.has_halves
            and self.adapter is None
            and z is not None
            and can_describe(z.unflatten(1, (2, width)))
            and divisor == 0
            and asks_for_backward(device_of(dy.device), dy.itemsize)
            # The error function of "gelu" takes more registers than the kernel has left.
            and routed.activation.name != "gelu"
        )
        return GroupedGemm(
            "backward_dX",
            dy,
            self.weight,
            routed.rows,
            x_divisor=divisor,
            epilogue="gated_activation_backward" if may_be_at_once else "none",
            # The rows of dh begin at sectors.
            can_describe_y=True,
            needs_schedule=need_dots and self.bias is not None,
            kernel_config=routed.kernel_config,
        )

    def _pingpong(
        self,
        gemm: GroupedGemm,
        z: torch.Tensor,
        dz: torch.Tensor,
        h: torch.Tensor | None,
        dots: torch.Tensor | None,
    ) -> None:
        """Launch the kernel that stores no dh; it writes one row of dots per column tile."""
        plan, schedule, routed, scale = gemm.plan, gemm.schedule, self.routed, self.scale
        assert schedule is not None  # such high tiles always come from a schedule
        block_m, block_n, block_k = plan.tile
        activation, width = routed.activation, gemm.n
        columns = epilogue_columns(plan.config, activation.name, activation.limit is not None)
        z_desc, dz_desc = (describe_parts(part, width, block_m, columns) for part in (z, dz))
        h_desc = dz_desc if h is None else describe_parts(h, width, block_m, columns)
        launch(
            kernels().experts.expert_down_bwd_pingpong_kernel, (gemm.programs,),
            describe_for_gluon(gemm.x, (block_m, block_k)),
            describe_b(gemm.b, block_n, block_k), z_desc, dz_desc, h_desc, scale,
            routed.rows.gather, dots, schedule.tiles, schedule.max_tiles, routed.rows.num_rows,
            width, gemm.k, routed.rows.top_k, activation.bound, *strides(scale),
            CHUNKS=block_n // columns, SLOTS=epilogue_slots(plan.config, gemm.device),
            HAS_SCALE=scale is not None, STORE_H=h is not None, STORE_DOTS=dots is not None,
            **activation.options, **plan.options,
            on=gemm.x, kernel_config=gemm.kernel_config,
        )  # fmt: skip

    def _activation_backward(
        self,
        dh: torch.Tensor | None,
        z: torch.Tensor | None,
        dz: torch.Tensor | None,
        h: torch.Tensor | None,
        dots: torch.Tensor | None,
    ) -> None:
        """Launch _expert_activation_bwd_kernel; h may be dh itself."""
        if z is not None:
            used_rows = self.offsets[1, -1:]
            launch_activation(self.routed, z, used_rows, self.scale, dh, dz, h, dots)


def up_gradients(
    dz: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    rows: Rows,
    hidden_states: torch.Tensor | None,
    need_dx: bool,
    kernel_config: str | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Return dX of the up projection, parts of the router gradient, and dz where dW finds it best.

    dX (R, H) is in expert order, and its rows of no expert may hold anything. The parts (any number,
    R) are by slot: <dX[row], hidden_states[its token]>, where weights multiply the experts' input.
    Where the product has copied dz for TMA, the copy serves dW as well.

    Args:
        dz ((R, U)): the gradient of the pre-activation, in expert order.
        weight ((E, U, H)): the up projection, in any strides or quantised.
        rows: the routed rows.
        hidden_states ((T, H)): in token order; None: the router gradient is not needed.
        need_dx: whether dX is needed.
        kernel_config: as of GroupedGemm.
    """
    need_dots = hidden_states is not None
    gemm = GroupedGemm(
        "backward_dX",
        dz,
        weight,
        rows,
        has_dots=need_dots,
        can_describe_y=True,
        kernel_config=kernel_config,
    )
    dx = gemm.new_operand() if need_dx else None
    dots = gemm.new_dots(has_bias=False) if need_dots else None
    gemm.launch(dx, other=hidden_states, gather_other=True, dots=dots, zeros_tail=False)
    return dx, dots, gemm.x
