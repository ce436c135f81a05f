# SPDX-License-Identifier: Apache-2.0
"""Launch the products that sum over an expert's rows: the gradients of a weight and of a bias.

E experts, M rows, which are contracted. An expert's weight is (N, D), its bias (N,).
"""

from __future__ import annotations

import torch

from moe_ops._triton.descriptors import (
    can_describe,
    can_describe_rows,
    describe,
    describe_for_gluon,
)
from moe_ops._triton.hopper import kernels
from moe_ops._triton.kernels.grouped_gemm_dw import (
    grouped_gemm_bwd_dbias_kernel,
    grouped_gemm_bwd_dw_kernel,
)
from moe_ops._triton.launch import cdiv, launch, precision, refuse_bf16, strides
from moe_ops._triton.plan import PERSISTENT, Plan, plan_once
from moe_ops._triton.rows import gather_rows
from moe_ops.configs.device import device_of
from moe_ops.configs.problem import rows_bucket
from moe_ops.configs.specialize import PINGPONG


def grad_weight(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    transposed: bool,
    kernel_config: str | None = None,
) -> torch.Tensor:
    """Return sum_i outer(g[i], x[i]) over each expert's rows, (E, N, D).

    If transposed, it is stored as (E, D, N).
    """
    refuse_bf16(g)
    num_experts, num_rows = offsets.shape[1], g.shape[0]
    left, right = (x, g) if transposed else (g, x)
    sizes = (num_experts, left.shape[1], right.shape[1])
    is_empty = num_rows == 0 or 0 in sizes
    stored = g.new_zeros(sizes) if is_empty else g.new_empty(sizes)
    gradient = stored.transpose(1, 2) if transposed else stored
    if is_empty:
        return gradient
    device = device_of(g.device)
    planned = plan_once(
        "backward_dW", g.dtype, num_experts, g.shape[1], x.shape[1],
        rows_bucket(num_rows, num_experts),
        gather=False, scatter=False, scale=False, bias=False, dots=False, transposed=transposed,
        epilogue="none",
        x=can_describe(left), b=can_describe(right), y=can_describe_rows(sizes[2], g.dtype),
        device=device, kernel_config=kernel_config, needs_schedule=False,
    )  # fmt: skip
    if planned.copied.x:
        left = gather_rows(left, None, None, 1)
    if planned.copied.b:
        right = gather_rows(right, None, None, 1)
    block_left, block_right, block_m = planned.tile
    tiles = num_experts * cdiv(sizes[1], block_left) * cdiv(sizes[2], block_right)
    programs = min(device.num_sms * planned.config.programs_per_sm, tiles)
    if planned.kernel != PERSISTENT:
        _specialized(planned, left, right, stored, offsets, programs, kernel_config)
        return gradient
    tma, columns = planned.tma, block_right // planned.config.epilogue_subtile
    left_desc = describe(left, (block_m, block_left), ragged=True) if tma.x else None
    right_desc = describe(right, (block_m, block_right), ragged=True) if tma.b else None
    desc = describe(stored, (1, block_left, columns)) if tma.y else None
    launch(
        grouped_gemm_bwd_dw_kernel, (programs,),
        left, left_desc, right, right_desc, stored, desc, offsets,
        *sizes, *left.stride(), *right.stride(),
        PRECISION=precision(g.dtype), **planned.options,
        on=g, kernel_config=kernel_config,
    )  # fmt: skip
    return gradient


def _specialized(
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
    left_desc = describe_for_gluon(left, (block_m, plan.group_rows), ragged=True)
    right_desc = describe_for_gluon(right, (block_m, block_right), ragged=True)
    columns = block_right // plan.config.epilogue_subtile
    desc = describe_for_gluon(stored, (1, plan.group_rows, columns))
    if plan.kernel == PINGPONG:
        kernel = kernels().pingpong.grouped_gemm_bwd_dw_pingpong_kernel
    else:
        kernel = kernels().cooperative.grouped_gemm_bwd_dw_cooperative_kernel
    launch(
        kernel, (programs,),
        left_desc, right_desc, desc, offsets, *stored.shape, **plan.options,
        on=left, kernel_config=kernel_config,
    )  # fmt: skip


def grad_bias(
    g: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None = None,
    gather: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of each expert's rows of g, (E, N), each row times scale[slot].

    It is summed in fp32 and returned in g's dtype.
    g is in expert order and scale is (T, top_k). The slot of row i is gather[i], or i without
    gather.
    """
    num_experts, width = offsets.shape[1], g.shape[1]
    summed = g.new_empty(num_experts, width)
    if summed.numel() > 0:
        block_n = 64
        launch(
            grouped_gemm_bwd_dbias_kernel, (num_experts, cdiv(width, block_n)),
            g, summed, offsets, scale, None if gather is None else gather.contiguous(),
            g.shape[0], num_experts, width, 1 if scale is None else scale.shape[1],
            *g.stride(), *strides(scale),
            BLOCK_M=64, BLOCK_N=block_n, HAS_SCALE=scale is not None,
            HAS_GATHER=gather is not None,
            on=g,
        )  # fmt: skip
    return summed
