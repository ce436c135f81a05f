# SPDX-License-Identifier: Apache-2.0
"""What the triton.py of several ops share of grouped GEMMs: tile schedule, configuration, launch.

In GEMM letters, as _triton/kernels/grouped_gemm.py: y (M, N) = x (M, K) @ b[e] (K, N) for the rows of each
expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops._triton import hopper
from moe_ops._triton.descriptors import describe
from moe_ops._triton.kernels.grouped_gemm import (
    grouped_gemm_bwd_bias_dots_kernel,
    grouped_gemm_bwd_dbias_kernel,
    grouped_gemm_bwd_dw_kernel,
    grouped_gemm_kernel,
)
from moe_ops._triton.kernels.schedule import expert_offsets_kernel, tile_schedule_kernel
from moe_ops._triton.launch import cdiv, launch_on, next_power_of_2, refuse_bf16, strides
from moe_ops._triton.rows import sum_rows
from moe_ops.configs import cache
from moe_ops.configs.choose import choose
from moe_ops.configs.device import Device, device_of
from moe_ops.configs.footprint import is_flattened
from moe_ops.configs.kernel_config import (
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.problem import Problem, rows_bucket
from moe_ops.configs.specialize import specializes

# Row tiles of at most so many rows find their place themselves: a schedule is one launch more.
_FINDS_TILES_ROWS = 32
# Columns that are zeroed at a time.
_BLOCK_W = 1024


@dataclass(frozen=True)
class _Tiling:
    """A forward's or a dX's configuration in the kernel's letters: y (M, N) = x (M, K) @ b (K, N).

    `options` are the arguments of a launch that it decides; `is_specialized` tells whether it is one
    for the kernels of _triton/hopper.py.
    """

    config: KernelConfig
    block_m: int
    block_n: int
    block_k: int
    tail_tiles: bool
    tma_x: bool
    tma_b: bool
    is_specialized: bool
    options: dict[str, Any]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Of y's rows, of its columns, and contracted."""
        return self.block_m, self.block_n, self.block_k


# What follows from sizes and flags is worked out once: a launch is to cost the host little.
@functools.lru_cache(maxsize=4096)
def _tiling(problem: Problem, device: Device, kernel_config: str | None) -> _Tiling:
    config = choose(problem, device, kernel_config)
    m, n, k = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    if isinstance(config, KernelConfigBackward_dX):
        n, k = k, n
        tail_tiles, tma_x = config.tail_tiles, config.use_tma_load_dy
    else:
        config = cast(KernelConfigForward, config)
        tail_tiles, tma_x = config.tail_tiles, config.use_tma_load_x
    options = {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": config.group_m,
        "BLOCK_W": _BLOCK_W, "FLATTEN": is_flattened(config, problem), "SUBTILE": config.epilogue_subtile,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    is_specialized = config.warp_specialize and specializes(problem, (m, n))
    tma_w = config.use_tma_load_w
    return _Tiling(config, m, n, k, tail_tiles, tma_x, tma_w, is_specialized, options)


cache.on_change.append(_tiling.cache_clear)


def _max_tiles(num_rows: int, block_m: int, num_experts: int) -> int:
    """Row tiles at most, however the rows are spread: each expert's last one may be partly empty."""
    return cdiv(num_rows, block_m) + num_experts


class TileSchedule:
    """The tiles of block_m rows that _triton/kernels/schedule.py makes of token_counts."""

    def __init__(self, token_counts: torch.Tensor, num_rows: int, block_m: int) -> None:
        self.token_counts = token_counts
        self.num_rows = num_rows
        self.num_experts = token_counts.shape[0]
        self.block_m = block_m
        self.max_tiles = _max_tiles(num_rows, block_m, self.num_experts)
        size = 3 * self.max_tiles + 2
        self.tiles = torch.empty(size, dtype=torch.int32, device=token_counts.device)

    @property
    def used_rows(self) -> torch.Tensor:
        """How many rows belong to an expert, (1,)."""
        return self.tiles[-1:]

    def launch(
        self, zeroed: torch.Tensor | None = None, scatter: torch.Tensor | None = None
    ) -> None:
        """Makes the schedule; zeros the rows of `zeroed` that belong to no expert.

        Those are the last ones, or where `scatter` says that they are stored.
        """
        num_sms = device_of(self.token_counts.device).num_sms
        with launch_on(self.token_counts):
            # More programs than experts: all of them share the rows to zero.
            tile_schedule_kernel[(max(self.num_experts, num_sms),)](
                self.token_counts, self.tiles, zeroed, scatter,
                self.num_rows, self.num_experts, self.max_tiles,
                0 if zeroed is None else zeroed.shape[1],
                BLOCK_M=self.block_m, EXPERTS=next_power_of_2(self.num_experts), BLOCK_W=_BLOCK_W,
                ZERO_TAIL=zeroed is not None, SCATTER=scatter is not None,
            )  # fmt: skip


class GroupedGemm:
    """One grouped GEMM over the rows of all experts; b is (E, K, N) in any strides.

    Args:
        kind: whose configuration it takes, "forward" or "backward_dX".
        x_divisor: x has rows of tokens, gathered from gather // x_divisor; 0: rows in expert order.
        needs_schedule: what comes after it reads its tile schedule.
        flags: what else the configuration depends on.
    """

    def __init__(
        self,
        kind: str,
        *,
        x: torch.Tensor,
        b: torch.Tensor,
        token_counts: torch.Tensor,
        num_rows: int,
        gather: torch.Tensor | None = None,
        x_divisor: int = 0,
        scale: torch.Tensor | None = None,
        top_k: int = 1,
        scatter_y: bool = False,
        has_bias: bool = False,
        has_dots: bool = False,
        needs_schedule: bool = False,
        flags: tuple[str, ...] = (),
        kernel_config: str | None = None,
    ) -> None:
        refuse_bf16(x)
        self.x, self.b = x, b
        self.token_counts = token_counts.contiguous()
        self.num_rows = num_rows
        self.gather = None if gather is None else gather.contiguous()
        self.x_divisor = x_divisor
        self.scale = scale
        self.top_k = top_k
        self.scatter_y = scatter_y
        self.kernel_config = kernel_config
        self.num_experts, self.k, self.n = b.shape
        self.b_is_nk = b.stride(1) == 1
        self.device = device_of(x.device)
        is_forward = kind == "forward"
        known = (
            x_divisor > 0, scatter_y, scale is not None, has_bias, has_dots,
            self.b_is_nk != is_forward,
        )  # fmt: skip
        problem = _problem(
            kind, x.dtype, self.num_experts, *((self.n, self.k) if is_forward else (self.k, self.n)),
            rows_bucket(num_rows, self.num_experts), known, flags,
        )  # fmt: skip
        self.tiling = _tiling(problem, self.device, kernel_config)
        self.tiles_n = cdiv(self.n, self.tiling.block_n)
        few_rows = self.tiling.block_m <= _FINDS_TILES_ROWS
        self.finds_tiles = few_rows and not has_dots and not needs_schedule
        self.schedule: TileSchedule | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no row that an expert could have."""
        return self.num_rows == 0 or self.num_experts == 0

    def make_schedule(
        self,
        zeroed: torch.Tensor | None = None,
        scatter: torch.Tensor | None = None,
        shared: TileSchedule | None = None,
    ) -> None:
        """Makes the schedule of its tiles, or takes the shared one where that has the same.

        A kernel that finds its tiles itself needs none. `zeroed` and `scatter` are those of
        TileSchedule.launch, which a shared one does not heed.
        """
        if self.finds_tiles:
            return
        block_m = self.tiling.block_m
        if shared is not None and shared.block_m == block_m:
            self.schedule = shared
            return
        self.schedule = TileSchedule(self.token_counts, self.num_rows, block_m)
        self.schedule.launch(zeroed, scatter)

    def new_dots(self, has_bias: bool) -> torch.Tensor:
        """Where the router gradient is summed up: a row per column tile, one more for the bias."""
        shape = (self.tiles_n + has_bias, self.num_rows)
        return torch.zeros(shape, dtype=torch.float32, device=self.x.device)

    def launch(
        self,
        y: torch.Tensor | None,
        *,
        bias: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
        gather_other: bool = False,
        dots: torch.Tensor | None = None,
        zeros_tail: bool = True,
        shared: TileSchedule | None = None,
    ) -> None:
        """Writes y[row] = scale * (x[row] @ b[e] + bias[e]).

        With `other`, also dots[column tile, slot] = <x[row] @ b[e], other[row]> of these columns.
        Without `zeros_tail` the rows of no expert are left as they are, and a `shared` schedule of
        another GEMM over the same rows may serve.
        """
        if self.is_empty:
            if y is not None:
                y.zero_()
            return
        tiling = self.tiling
        self.make_schedule(
            y if zeros_tail else None, self.gather if self.scatter_y else None, shared
        )
        if y is not None and self._launch_on_hopper(y, bias):
            return
        x_desc, b_desc = self.describe_operands(tiling.block_m)
        y_desc = self.describe_output(y, tiling.block_m)
        x_tail_desc = y_tail_desc = None
        if tiling.tail_tiles:
            x_tail_desc, _ = self.describe_operands(tiling.block_m // 2)
            y_tail_desc = self.describe_output(y, tiling.block_m // 2)
        try:
            with launch_on(self.x):
                grouped_gemm_kernel[(self.programs,)](
                    self.x, x_desc, x_tail_desc, self.b, b_desc, bias, self.scale, self.gather,
                    y, y_desc, y_tail_desc, other, dots, *self.tile_arguments(),
                    self.n, self.k, self.top_k,
                    max(self.x_divisor, 1), self.top_k if gather_other else 1,
                    *self.x.stride(), *self.b.stride(), *strides(bias), *strides(self.scale),
                    *strides(other),
                    SCATTER_Y=self.scatter_y, HAS_GATHER=self.gather is not None,
                    HAS_SCALE=self.scale is not None, STORE_Y=y is not None,
                    HAS_DOTS=dots is not None, GATHER_OTHER=gather_other,
                    TMA_Y=y_desc is not None, TAIL_TILES=tiling.tail_tiles,
                    **self.options(x_desc, b_desc, bias),
                )  # fmt: skip
        except OutOfResources as error:
            refuse_too_large(error, self.kernel_config)

    def tiles_for_hopper(self) -> hopper.ScheduledTiles | None:
        """What _triton/hopper.py takes; None where a kernel of it is not asked for."""
        tiling, schedule = self.tiling, self.schedule
        if schedule is None or not tiling.is_specialized:
            return None
        return hopper.ScheduledTiles(
            schedule.tiles, schedule.max_tiles, self.programs, tiling.blocks,
            tiling.config,
        )  # fmt: skip

    def _launch_on_hopper(self, y: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Launches a kernel for Hopper, where that is asked for and can be."""
        scheduled = self.tiles_for_hopper()
        if scheduled is None:
            return False
        try:
            return hopper.grouped_gemm(
                self.x, self.b, y, scheduled, bias, self.scale, self.gather, self.top_k,
                self.scatter_y,
            )  # fmt: skip
        except OutOfResources as error:
            refuse_too_large(error, self.kernel_config)

    @property
    def programs(self) -> int:
        """The size of a persistent grid."""
        tiles_m = _max_tiles(self.num_rows, self.tiling.block_m, self.num_experts)
        programs = self.device.num_sms * self.tiling.config.programs_per_sm
        return min(programs, max(tiles_m * self.tiles_n, 1))

    def tile_arguments(self) -> tuple[Any, ...]:
        """counts, tiles, max_tiles, num_rows and num_experts: from what a kernel gets its tiles."""
        tiles, max_tiles = None, 0
        if self.schedule is not None:
            tiles, max_tiles = self.schedule.tiles, self.schedule.max_tiles
        return self.token_counts, tiles, max_tiles, self.num_rows, self.num_experts

    def options(
        self,
        x_desc: TensorDescriptor | None,
        b_desc: TensorDescriptor | None,
        bias: torch.Tensor | None,
    ) -> dict[str, Any]:
        """The constexpr arguments that all kernels of such a GEMM have, and Triton's own."""
        # Triton's interpreter has no kernel to follow.
        follows = self.tiling.config.launch_pdl and self.device.has_tma and not self.x.is_cpu
        return {
            **self.tiling.options, "PDL": follows, **({"launch_pdl": True} if follows else {}),
            "PRECISION": _precision(self.x.dtype),
            "TMA_X": x_desc is not None, "TMA_B": b_desc is not None, "B_IS_NK": self.b_is_nk,
            "EVEN_K": self.k % self.tiling.block_k == 0, "GATHER_X": self.x_divisor > 0,
            "HAS_BIAS": bias is not None, "FINDS_TILES": self.finds_tiles,
            "EXPERTS": next_power_of_2(self.num_experts) if self.finds_tiles else 1,
        }  # fmt: skip

    def describe_operands(
        self, block_m: int, halves: bool = False
    ) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Descriptors of x and b, for tiles of block_m rows; None where pointers serve.

        With `halves`, a tile has half of its columns in each half of b's.
        """
        tiling = self.tiling
        x_desc = b_desc = None
        if tiling.tma_x and not self.x_divisor:
            x_desc = describe(self.x, (block_m, tiling.block_k))
        if tiling.tma_b:
            described = self.b.transpose(1, 2) if self.b_is_nk else self.b
            n_axis = 1 if self.b_is_nk else 2
            columns = (2, tiling.block_n // 2) if halves else (tiling.block_n,)
            depth = (tiling.block_k,)
            block = (1, *columns, *depth) if self.b_is_nk else (1, *depth, *columns)
            if halves:
                described = described.unflatten(n_axis, (2, self.n // 2))
            b_desc = describe(described, block)
        return x_desc, b_desc

    def describe_output(self, y: torch.Tensor | None, block_m: int) -> TensorDescriptor | None:
        """A descriptor of y, for tiles of block_m rows; None where pointers serve."""
        if y is None or self.scatter_y:
            return None
        columns = self.tiling.block_n // self.tiling.config.epilogue_subtile
        return self.describe_rows(y, (block_m, columns))

    def describe_rows(self, rows: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
        """A descriptor that ends at an expert's last row, wherever that is; None for pointers."""
        return describe(rows, block, ragged=True) if self.tiling.config.use_tma_store else None

    def launch_bias_dots(self, bias: torch.Tensor, dots: torch.Tensor) -> None:
        """Writes dots[slot] = <x[row], bias[e]>, on the schedule that `launch` made."""
        if self.is_empty or self.schedule is None:
            return
        max_tiles = self.schedule.max_tiles
        with launch_on(self.x):
            grouped_gemm_bwd_bias_dots_kernel[(max_tiles,)](
                self.x, self.gather, bias, dots, self.schedule.tiles, max_tiles, self.num_rows,
                self.k, max(self.x_divisor, 1), *self.x.stride(), *bias.stride(),
                BLOCK_M=self.schedule.block_m, BLOCK_N=64, HAS_GATHER=self.gather is not None,
                GATHER_G=self.x_divisor > 0,
            )  # fmt: skip


def expert_offsets(token_counts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """First row and end row of each expert, int32 (2, E)."""
    num_experts = token_counts.shape[0]
    offsets = torch.empty(2, num_experts, dtype=torch.int32, device=token_counts.device)
    if num_experts > 0:
        with launch_on(token_counts):
            expert_offsets_kernel[(1,)](
                token_counts.contiguous(), offsets, num_rows, num_experts,
                EXPERTS=next_power_of_2(num_experts),
            )  # fmt: skip
    return offsets


def grad_weight(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    transposed: bool,
    kernel_config: str | None,
) -> torch.Tensor:
    """sum_i outer(g[i], x[i]) of each expert's rows, (E, N, D), stored (E, D, N) if transposed."""
    refuse_bf16(g)
    num_experts, num_rows = offsets.shape[1], g.shape[0]
    left, right = (x, g) if transposed else (g, x)
    sizes = (num_experts, left.shape[1], right.shape[1])
    stored = g.new_zeros(sizes) if num_rows == 0 else g.new_empty(sizes)
    if num_rows > 0 and stored.numel() > 0:
        known = (False, False, False, False, False, transposed)
        rows = rows_bucket(num_rows, num_experts)
        problem = _problem("backward_dW", g.dtype, num_experts, g.shape[1], x.shape[1], rows, known)
        device = device_of(g.device)
        config = cast(KernelConfigBackward_dW, choose(problem, device, kernel_config))
        block_m, block_left, block_right = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
        tma_left, tma_right = config.use_tma_load_dy, config.use_tma_load_x
        if transposed:
            block_left, block_right = block_right, block_left
            tma_left, tma_right = tma_right, tma_left
        tiles_left = cdiv(left.shape[1], block_left)
        tiles = num_experts * tiles_left * cdiv(right.shape[1], block_right)
        programs = min(device.num_sms * config.programs_per_sm, tiles)
        columns = block_right // config.epilogue_subtile
        try:
            if config.warp_specialize and hopper.grad_weight(
                left, right, stored, offsets, programs, (block_m, block_left, block_right), config
            ):
                return stored.transpose(1, 2) if transposed else stored
            left_desc = describe(left, (block_m, block_left), ragged=True) if tma_left else None
            right_desc = describe(right, (block_m, block_right), ragged=True) if tma_right else None
            desc = describe(stored, (1, block_left, columns)) if config.use_tma_store else None
            with launch_on(g):
                grouped_gemm_bwd_dw_kernel[(programs,)](
                    left, left_desc, right, right_desc, stored, desc, offsets,
                    *sizes, *left.stride(), *right.stride(),
                    BLOCK_M=block_m, BLOCK_N=block_left, BLOCK_D=block_right, GROUP=config.group_m,
                    PRECISION=_precision(g.dtype), TMA_G=left_desc is not None,
                    TMA_X=right_desc is not None, TMA_DW=desc is not None,
                    FLATTEN=config.flatten, SUBTILE=config.epilogue_subtile,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        except OutOfResources as error:
            refuse_too_large(error, kernel_config)
    return stored.transpose(1, 2) if transposed else stored


def grad_bias(
    g: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None = None,
    gather: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each expert's rows, (E, N), in fp32, each times scale[slot] where given.

    g is in expert order; scale is (T, top_k), and the slot of row i is gather[i], or i without.
    """
    num_experts, width = offsets.shape[1], g.shape[1]
    summed = g.new_empty(num_experts, width)
    if summed.numel() > 0:
        block_n = 64
        with launch_on(g):
            grouped_gemm_bwd_dbias_kernel[(num_experts, cdiv(width, block_n))](
                g, summed, offsets, scale, None if gather is None else gather.contiguous(),
                g.shape[0], num_experts, width, 1 if scale is None else scale.shape[1],
                *g.stride(), *strides(scale),
                BLOCK_M=64, BLOCK_N=block_n, HAS_SCALE=scale is not None,
                HAS_GATHER=gather is not None,
            )  # fmt: skip
    return summed


def sum_neighbours(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T * top_k, H) -> (T, H): the sum of every top_k neighbouring rows."""
    slots = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return sum_rows(rows, slots, None, top_k)


def refuse_too_large(error: OutOfResources, kernel_config: str | None) -> NoReturn:
    """A configuration that the caller gave and that does not fit the GPU is the caller's error."""
    if kernel_config is None:
        raise error
    raise ValueError(f"moe_ops: kernel_config does not fit this GPU: {error}") from error


_FLAGS = ("gather", "scatter", "scale", "bias", "dots", "transposed")


@functools.lru_cache(maxsize=4096)
def _problem(
    kind: str,
    dtype: torch.dtype,
    num_experts: int,
    out_features: int,
    in_features: int,
    rows: int,
    known: tuple[bool, ...],
    flags: tuple[str, ...] = (),
) -> Problem:
    """A problem with those of _FLAGS that are known to be set, and more."""
    names = (name for name, is_set in zip(_FLAGS, known, strict=True) if is_set)
    name = str(dtype).removeprefix("torch.")
    return Problem(kind, name, num_experts, out_features, in_features, rows, (*names, *flags))


def _precision(dtype: torch.dtype) -> str:
    """How products are taken: fp32 ones as torch's own matmul precision setting says."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
