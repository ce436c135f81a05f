# SPDX-License-Identifier: Apache-2.0
"""Launch grouped GEMMs over the rows of all experts: y (M, N) = x (M, K) @ b[e] (K, N).

M rows, N columns of the result, K contracted elements, E experts, T tokens. A GroupedGemm plans its
product when it is made. Its methods then allocate, schedule and launch as the plan says. dW is in
weight_gradient.py.

The op's names become the product's, for forward and dX have one kernel:

    op                              GroupedGemm, kernel
    weight (E, N, D)                b (E, K, N): its transpose in forward, itself in dX
    out_features N, in_features D   N and K in forward, K and N in dX
    topk_weights                    scale
    permute_x, top_k                x_divisor: which row of x a row reads; 0: its own
    permute_y                       scatter_y
    BLOCK_M, BLOCK_N, BLOCK_K       rows, columns and steps of the tile in forward;
                                    in dX rows, steps and columns (KernelConfig.TILE)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops._triton.descriptors import (
    can_describe,
    can_describe_rows,
    describe,
    describe_for_gluon,
)
from moe_ops._triton.hopper import describe_b, kernels
from moe_ops._triton.kernels.grouped_gemm import grouped_gemm_kernel
from moe_ops._triton.kernels.grouped_gemm_dw import (
    grouped_gemm_bwd_bias_dots_kernel,
)
from moe_ops._triton.launch import cdiv, launch, precision, refuse_bf16, strides
from moe_ops._triton.plan import PERSISTENT, plan_once
from moe_ops._triton.quantized import Scratch, plan_stored
from moe_ops._triton.rows import gather_rows, new_rows
from moe_ops._triton.schedule import Rows, TileSchedule
from moe_ops.configs.device import device_of
from moe_ops.configs.kernel_config import TALL_BLOCK_ROWS
from moe_ops.configs.problem import Epilogue, rows_bucket
from moe_ops.configs.specialize import PINGPONG, TALL
from moe_ops.quantization.stored import StoredWeight


class GroupedGemm:
    """Plan one grouped GEMM, and launch it.

    A quantised weight is dequantised a part of its experts at a time. Each part is one launch, with
    the experts' rows and tiles as without parts, so that the numbers do not depend on them.

    Args:
        kind: the pass whose configuration it takes, "forward" or "backward_dX".
        x: the rows in expert order, or with x_divisor in the order of tokens or slots.
        weight: the experts' matrices (E, out_features, in_features), in any strides or quantised.
            The product's b (E, K, N) is their transpose in forward.
        rows: the rows of each expert.
        x_divisor: row i of the product reads x[gather[i] // x_divisor], or with 0 x[i].
        scale ((T, top_k), floating): weight of each slot.
        bias ((E, N), floating): added to the product.
        scatter_y: whether row i of the product is stored at gather[i].
        has_dots: whether the router gradient is summed.
        epilogue: what is computed on top of the product.
        can_describe_x: whether TMA can describe x; None: x itself decides, or K if it is gathered.
        can_describe_y: whether TMA can describe the output, if it has columns; None: N decides.
        needs_schedule: whether a later step reads the tile schedule.
        kernel_config: the caller's configurations.
    """

    def __init__(
        self,
        kind: str,
        x: torch.Tensor,
        weight: torch.Tensor | StoredWeight,
        rows: Rows,
        *,
        x_divisor: int = 0,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        scatter_y: bool = False,
        has_dots: bool = False,
        epilogue: Epilogue = "none",
        can_describe_x: bool | None = None,
        can_describe_y: bool | None = None,
        needs_schedule: bool = False,
        kernel_config: str | None = None,
    ) -> None:
        refuse_bf16(x)
        is_forward = kind == "forward"
        self._scratch: Scratch | None = None
        self.b: torch.Tensor
        if isinstance(weight, torch.Tensor):
            self.b = weight.transpose(1, 2) if is_forward else weight
            self.b_is_nk = self.b.stride(1) == 1
            can_describe_b = can_describe(self.b, 1 if self.b_is_nk else 2)
        else:
            planned = plan_stored(kind, weight, x.dtype, rows, kernel_config)
            self._scratch = Scratch(weight, x, planned)
            self.b_is_nk, can_describe_b = is_forward, self._scratch.can_describe
        self.x, self.rows, self._owns_x = x, rows, False
        self.x_divisor, self.scale, self.bias, self.scatter_y = x_divisor, scale, bias, scatter_y
        self.kernel_config = kernel_config
        num_experts, out_features, in_features = weight.shape
        self.k, self.n = (in_features, out_features) if is_forward else (out_features, in_features)
        self.device = device_of(x.device)
        if can_describe_y is None:
            can_describe_y = can_describe_rows(self.n, x.dtype)
        # A kernel that cannot gather gets a copy of the rows: a new matrix.
        if can_describe_x is None:
            can_describe_x = can_describe_rows(self.k, x.dtype) if x_divisor else can_describe(x)
        if epilogue == "gated_activation" and not self.b_is_nk:
            # b is stored (K, N), so gate and up are the halves of each row.
            can_describe_b = can_describe_b and can_describe_rows(self.n // 2, x.dtype)
        self.plan = plan_once(
            kind, x.dtype, num_experts, out_features, in_features,
            rows_bucket(rows.num_rows, num_experts),
            x_divisor > 0, scatter_y, scale is not None, bias is not None, has_dots,
            self.b_is_nk != is_forward, epilogue,
            can_describe_x, can_describe_b, can_describe_y and self.n > 0,
            self.device, kernel_config, needs_schedule or self.num_parts > 1,
        )  # fmt: skip
        self.tiles_n = cdiv(self.n, self.plan.tile[1])
        self.schedule: TileSchedule | None = None

    @property
    def num_parts(self) -> int:
        """Return how many launches compute the product."""
        return 1 if self._scratch is None else len(self._scratch.bounds)

    def whole_schedule(self) -> TileSchedule | None:
        """Return a tile schedule of all experts for another kernel; None: it finds its tiles.

        It is that of the launch. But the schedules of a product in parts are of some experts each, and
        the rows of a tall tile are no block of Triton's, so then it makes another one.
        """
        is_tall = self.plan.kernel == TALL
        if (self.num_parts == 1 and not is_tall) or self.rows.is_empty:
            return self.schedule
        whole = TileSchedule(self.rows, TALL_BLOCK_ROWS if is_tall else self.plan.tile[0])
        whole.launch()
        return whole

    def parts(
        self,
        zeroed: torch.Tensor | None = None,
        scatter: torch.Tensor | None = None,
        shared: TileSchedule | None = None,
    ) -> Iterator[None]:
        """Prepare the launch of each part in turn: copy its operands, and make its schedule.

        While a part is prepared, b, bias and the schedule are those of its experts. A plain weight
        is one part. TileSchedule.launch explains `zeroed` and `scatter`. A `shared` schedule, which
        ignores them, is taken if its tiles are as high and there is one part.
        """
        if self._scratch is None:
            self.copy_operands()
            self._make_schedule(zeroed, scatter, shared, (0, self.rows.num_experts))
            yield
            return
        bias, is_nk = self.bias, self.b_is_nk
        for first, end, part in self._scratch.parts():
            self.b = part.transpose(1, 2) if is_nk else part
            self.bias = None if bias is None else bias[first:end]
            self.copy_operands()
            self._make_schedule(zeroed, scatter, shared, (first, end))
            # The first schedule has zeroed them.
            zeroed = None
            yield
        self.bias = bias

    def _make_schedule(
        self,
        zeroed: torch.Tensor | None,
        scatter: torch.Tensor | None,
        shared: TileSchedule | None,
        experts: tuple[int, int],
    ) -> None:
        """Make the tile schedule of these experts. A kernel that finds its tiles needs none."""
        if self.plan.finds_tiles:
            return
        block_m = self.plan.tile[0]
        if self.num_parts == 1 and shared is not None and shared.block_m == block_m:
            self.schedule = shared
            return
        self.schedule = TileSchedule(self.rows, block_m, experts)
        self.schedule.launch(zeroed, scatter)

    def own_x(self, x: torch.Tensor) -> None:
        """Take a copy of x in expert order, whose rows begin at sectors, in place of x."""
        self.x, self.x_divisor, self._owns_x = x, 0, True

    def copy_operands(self) -> None:
        """Copy the operands that the plan says: gathered rows into expert order, b as it is."""
        copied = self.plan.copied
        if copied.x and not self._owns_x:
            gather = self.rows.gather if self.x_divisor else None
            self.own_x(gather_rows(self.x, gather, None, self.rows.top_k, self.x_divisor))
        if copied.b:
            if self.b_is_nk:
                self.b = _copied(self.b.transpose(1, 2)).transpose(1, 2)
            else:
                self.b = _copied(self.b)

    def new_operand(self) -> torch.Tensor:
        """Return room for y (M, N), for use as an operand of another product."""
        shape = self.rows.num_rows, self.n
        # Pointers store contiguous rows. So does a kernel that finds its tiles: it zeros the others.
        is_padded = self.plan.tma.y and not self.plan.finds_tiles
        return new_rows(self.x, *shape) if is_padded else self.x.new_empty(shape)

    def describes(self, y: torch.Tensor | None) -> bool:
        """Return whether a descriptor stores y."""
        return y is not None and self.plan.tma.y

    def new_dots(self, has_bias: bool) -> torch.Tensor:
        """Return zeros for the router gradient: a row for each column tile, and one for a bias."""
        shape = (self.tiles_n + has_bias, self.rows.num_rows)
        return torch.zeros(shape, dtype=torch.float32, device=self.x.device)

    def launch(
        self,
        y: torch.Tensor | None,
        *,
        other: torch.Tensor | None = None,
        gather_other: bool = False,
        dots: torch.Tensor | None = None,
        zeros_tail: bool = True,
        shared: TileSchedule | None = None,
    ) -> None:
        """Write y[row] = scale * (x[row] @ b[e] + bias[e]).

        With `other` it also writes dots[column tile, slot] = <x[row] @ b[e], other[row]>, summed
        over the tile's columns. With `zeros_tail` it zeros the rows of no expert. Without, these
        rows may hold anything, and the `shared` schedule of another GEMM over the same rows may
        serve.
        """
        if self.rows.is_empty:
            if y is not None:
                y.zero_()
            return
        zeroed = y if zeros_tail else None
        for _ in self.parts(zeroed, self.rows.gather if self.scatter_y else None, shared):
            self._launch_part(y, other, gather_other, dots)

    def _launch_part(
        self,
        y: torch.Tensor | None,
        other: torch.Tensor | None,
        gather_other: bool,
        dots: torch.Tensor | None,
    ) -> None:
        if self.plan.kernel != PERSISTENT:
            assert y is not None
            self._launch_specialized(y)
            return
        plan, rows, bias = self.plan, self.rows, self.bias
        block_m, _, _ = plan.tile
        x_desc, b_desc = self.describe_operands(block_m)
        y_desc = self.describe_output(y, block_m)
        x_tail_desc = y_tail_desc = None
        if plan.tail_tiles:
            x_tail_desc, _ = self.describe_operands(block_m // 2)
            y_tail_desc = self.describe_output(y, block_m // 2)
        launch(
            grouped_gemm_kernel, (self.programs,),
            self.x, x_desc, x_tail_desc, self.b, b_desc, bias, self.scale, rows.gather,
            y, y_desc, y_tail_desc, other, dots, *self.tile_arguments(),
            self.n, self.k, self.slots_per_weight, max(self.x_divisor, 1),
            rows.top_k if gather_other else 1,
            *self.x.stride(), *self.b.stride(), *strides(bias), *strides(self.scale),
            *strides(other),
            HAS_BIAS=bias is not None, TAIL_TILES=plan.tail_tiles,
            **self.row_options(y, dots, gather_other),
            **self.options(),
            on=self.x, kernel_config=self.kernel_config,
        )  # fmt: skip

    def _launch_specialized(self, y: torch.Tensor) -> None:
        plan, rows, schedule = self.plan, self.rows, self.schedule
        bias, scale = self.bias, self.scale
        assert schedule is not None  # such high tiles always come from a schedule
        block_k = plan.tile[2]
        columns = plan.group_columns // plan.config.epilogue_subtile
        x_desc = describe_for_gluon(self.x, (plan.group_rows, block_k))
        b_desc = describe_b(self.b, plan.group_columns, block_k)
        y_desc = describe_for_gluon(y, (plan.group_rows, columns), ragged=True)
        if plan.kernel != PINGPONG:
            kernel = (
                kernels().tall.grouped_gemm_tall_kernel
                if plan.kernel == TALL
                else kernels().cooperative.grouped_gemm_cooperative_kernel
            )
            launch(
                kernel, (self.programs,),
                x_desc, b_desc, y_desc, schedule.tiles, schedule.max_tiles, self.n, self.k,
                **plan.options,
                on=self.x, kernel_config=self.kernel_config,
            )  # fmt: skip
            return
        # Not passed where it is not read: Triton would compile another kernel for it.
        gather = rows.gather if self.scatter_y or scale is not None else None
        launch(
            kernels().pingpong.grouped_gemm_pingpong_kernel, (self.programs,),
            x_desc, b_desc, y_desc, y, bias, scale, gather, schedule.tiles, schedule.max_tiles,
            rows.num_rows, self.n, self.k, self.slots_per_weight, *strides(bias), *strides(scale),
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
            HAS_GATHER=gather is not None, SCATTER_Y=self.scatter_y, **plan.options,
            on=self.x, kernel_config=self.kernel_config,
        )  # fmt: skip

    @property
    def programs(self) -> int:
        """Return the number of programs of the persistent grid."""
        tiles = self.rows.max_tiles(self.plan.tile[0]) * self.tiles_n
        return min(self.device.num_sms * self.plan.config.programs_per_sm, max(tiles, 1))

    @property
    def slots_per_weight(self) -> int:
        """Return the kernel's top_k, or 1 without a scale.

        Only a scale reads it. A constant saves Triton from compiling the kernel again.
        """
        return 1 if self.scale is None else self.rows.top_k

    def tile_arguments(self) -> tuple[Any, ...]:
        """Return the arguments that tell a kernel its tiles: from the counts to num_experts."""
        tiles, max_tiles = None, 0
        if self.schedule is not None:
            tiles, max_tiles = self.schedule.tiles, self.schedule.max_tiles
        rows = self.rows
        return rows.token_counts, tiles, max_tiles, rows.num_rows, rows.num_experts

    def options(self) -> dict[str, Any]:
        """Return the constexpr arguments of every persistent kernel, and Triton's own options."""
        return {**self.plan.options, "PRECISION": precision(self.x.dtype)}

    def row_options(
        self, y: torch.Tensor | None, dots: torch.Tensor | None, gather_other: bool
    ) -> dict[str, Any]:
        """Return the constexpr arguments of finish_tile."""
        return {
            "SCATTER_Y": self.scatter_y, "HAS_GATHER": self.rows.gather is not None,
            "HAS_SCALE": self.scale is not None, "STORE_Y": y is not None,
            "TMA_Y": self.describes(y),
            "HAS_DOTS": dots is not None, "GATHER_OTHER": gather_other,
        }  # fmt: skip

    def describe_operands(
        self, block_m: int, halves: bool = False
    ) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Return descriptors of x and b for tiles of block_m rows, or None where pointers serve.

        With `halves`, a tile takes half of its columns from each half of b's columns.
        """
        _, block_n, block_k = self.plan.tile
        x_desc = describe(self.x, (block_m, block_k)) if self.plan.tma.x else None
        if not self.plan.tma.b:
            return x_desc, None
        b_is_nk = self.plan.options["B_IS_NK"]
        described = self.b.transpose(1, 2) if b_is_nk else self.b
        columns = (2, block_n // 2) if halves else (block_n,)
        if halves:
            described = described.unflatten(1 if b_is_nk else 2, (2, self.n // 2))
        block = (1, *columns, block_k) if b_is_nk else (1, block_k, *columns)
        return x_desc, describe(described, block)

    def describe_output(self, y: torch.Tensor | None, block_m: int) -> TensorDescriptor | None:
        """Return a descriptor that ends at an expert's last row, or None where pointers serve."""
        if y is None or not self.describes(y):
            return None
        columns = self.plan.tile[1] // self.plan.config.epilogue_subtile
        return describe(y, (block_m, columns), ragged=True)

    def launch_bias_dots(self, bias: torch.Tensor, dots: torch.Tensor) -> None:
        """Write dots[slot] = <x[row], bias[e]>, by the schedule that `launch` made."""
        if self.rows.is_empty:
            return
        rows, schedule = self.rows, self.whole_schedule()
        assert schedule is not None  # the plan was told that it is needed
        launch(
            grouped_gemm_bwd_bias_dots_kernel, (schedule.max_tiles,),
            self.x, rows.gather, bias, dots, schedule.tiles, schedule.max_tiles, rows.num_rows,
            self.k, max(self.x_divisor, 1), *self.x.stride(), *bias.stride(),
            BLOCK_M=schedule.block_m, BLOCK_N=64, HAS_GATHER=rows.gather is not None,
            GATHER_G=self.x_divisor > 0,
            on=self.x,
        )  # fmt: skip


def _copied(matrices: torch.Tensor) -> torch.Tensor:
    """Copy matrices (E, rows, columns) into rows that begin at sectors, which TMA can load.

    Matrices that are not one behind the other are first made contiguous, which is a second copy.
    """
    num_experts, num_rows, _ = matrices.shape
    return gather_rows(matrices.flatten(0, 1), None, None, 1).unflatten(0, (num_experts, num_rows))
