# SPDX-License-Identifier: Apache-2.0
"""Launch the warp-specialised kernels for Hopper, where a plan says so.

These kernels load and store through descriptors only. The plan has made sure that TMA can describe
every operand.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from moe_ops._triton.descriptors import describe_for_gluon
from moe_ops._triton.launch import launch, strides
from moe_ops.configs.specialize import COOPERATIVE, PINGPONG

if TYPE_CHECKING:
    from moe_ops._triton.gemm import GroupedGemm
    from moe_ops._triton.plan import Plan
    from moe_ops._triton.schedule import TileSchedule


@functools.cache
def why_no_kernels() -> str | None:
    """Return why this Triton cannot compile the kernels, or None if it can."""
    # Gluon is experimental: a later Triton may have moved what the kernels use.
    try:
        kernels()
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon lacks what its kernels are made of: {error}"
    return None


@functools.cache
def kernels() -> SimpleNamespace:
    """Import the kernels' modules, and with them Gluon, when they are first needed."""
    from moe_ops._triton.kernels import hopper_cooperative, hopper_experts, hopper_pingpong

    return SimpleNamespace(
        cooperative=hopper_cooperative, pingpong=hopper_pingpong, experts=hopper_experts
    )


def group_rows(plan: Plan) -> int:
    """Return how many rows of a tile one group of warps owns: all if ping-pong, else half."""
    return plan.tile[0] if plan.kernel == PINGPONG else plan.tile[0] // 2


def grouped_gemm(gemm: GroupedGemm, y: torch.Tensor, schedule: TileSchedule) -> None:
    """Write y[row] = scale * (x[row] @ b[e] + bias[e]); with scatter_y, at the row's slot."""
    plan, rows, x, b = gemm.plan, gemm.rows, gemm.x, gemm.b
    _, block_n, block_k = plan.tile
    x_desc = describe_for_gluon(x, (group_rows(plan), block_k))
    b_desc = describe_b(b, block_n, block_k)
    columns = block_n // plan.config.epilogue_subtile
    y_desc = describe_for_gluon(y, (group_rows(plan), columns), ragged=True)
    if plan.kernel == COOPERATIVE:
        launch(
            kernels().cooperative.grouped_gemm_cooperative_kernel, (gemm.programs,),
            x_desc, b_desc, y_desc, schedule.tiles, schedule.max_tiles, gemm.n, gemm.k,
            **plan.options,
            on=x, kernel_config=gemm.kernel_config,
        )  # fmt: skip
        return
    scale = gemm.scale
    # Not passed where it is not read: Triton would compile another kernel for it.
    gather = rows.gather if gemm.scatter_y or scale is not None else None
    launch(
        kernels().pingpong.grouped_gemm_pingpong_kernel, (gemm.programs,),
        x_desc, b_desc, y_desc, y, gemm.bias, scale, gather, schedule.tiles, schedule.max_tiles,
        rows.num_rows, gemm.n, gemm.k, gemm.slots_per_weight, *strides(gemm.bias), *strides(scale),
        HAS_BIAS=gemm.bias is not None, HAS_SCALE=scale is not None,
        HAS_GATHER=gather is not None, SCATTER_Y=gemm.scatter_y, **plan.options,
        on=x, kernel_config=gemm.kernel_config,
    )  # fmt: skip


def grad_weight(
    plan: Plan,
    left: torch.Tensor,
    right: torch.Tensor,
    stored: torch.Tensor,
    offsets: torch.Tensor,
    programs: int,
    kernel_config: str | None,
) -> None:
    """Write stored[e] = sum_i outer(left[i], right[i]) over each expert's rows."""
    _, block_right, block_m = plan.tile
    left_desc = describe_for_gluon(left, (block_m, group_rows(plan)), ragged=True)
    right_desc = describe_for_gluon(right, (block_m, block_right), ragged=True)
    columns = block_right // plan.config.epilogue_subtile
    desc = describe_for_gluon(stored, (1, group_rows(plan), columns))
    if plan.kernel == PINGPONG:
        kernel = kernels().pingpong.grouped_gemm_bwd_dw_pingpong_kernel
    else:
        kernel = kernels().cooperative.grouped_gemm_bwd_dw_cooperative_kernel
    launch(
        kernel, (programs,),
        left_desc, right_desc, desc, offsets, *stored.shape, **plan.options,
        on=left, kernel_config=kernel_config,
    )  # fmt: skip


def describe_b(b: torch.Tensor, block_n: int, block_k: int, halves: bool = False) -> Any:
    """Return a descriptor of b (E, K, N) in its stored order: (E, N, K) where K is dense.

    With `halves`, a block takes half of its columns from each half of b's. This is for b stored as
    (E, N, K) only.
    """
    if b.stride(1) != 1:
        return describe_for_gluon(b, (1, block_k, block_n))
    stored = b.transpose(1, 2)
    if halves:
        stored = stored.unflatten(1, (2, b.shape[2] // 2))
        return describe_for_gluon(stored, (1, 2, block_n // 2, block_k))
    return describe_for_gluon(stored, (1, block_n, block_k))


def describe_parts(rows: torch.Tensor, width: int, block_rows: int, columns: int) -> Any:
    """Return a ragged descriptor of rows in parts of `width` columns: gate and up, or one part."""
    parts = rows.unflatten(1, (-1, width))
    return describe_for_gluon(parts, (block_rows, 1, columns), ragged=True)
