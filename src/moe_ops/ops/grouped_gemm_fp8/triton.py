# SPDX-License-Identifier: Apache-2.0
"""Run grouped_gemm_fp8 and its dX in Triton; one kernel computes both."""

from __future__ import annotations

import torch

from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.launch import launch, strides
from moe_ops._triton.rows import sum_parts, sum_rows
from moe_ops._triton.schedule import Rows
from moe_ops.fp8 import BLOCK
from moe_ops.ops.grouped_gemm_fp8.kernels import grouped_gemm_fp8_kernel


def grouped_gemm_fp8(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    gemm = GroupedGemm(
        "forward",
        input,
        weight.view(torch.uint8).transpose(1, 2),
        Rows.of(token_counts, num_rows, gather_indices, top_k),
        x_divisor=top_k if permute_x else 0,
        scale=topk_weights,
        scatter_y=permute_y,
        kernel_config=kernel_config,
    )
    _check_config(gemm)
    output = input.new_empty(num_rows, weight.shape[1])
    _launch(gemm, weight_scale.transpose(1, 2), output)
    return output


def grouped_gemm_fp8_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    input: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = grad_output.shape[0]
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    gemm = GroupedGemm(
        "backward_dX",
        grad_output,
        weight.view(torch.uint8),
        Rows.of(token_counts, num_rows, gather_indices, top_k),
        x_divisor=1 if permute_y else 0,
        scale=topk_weights,
        scatter_y=permute_x,
        has_dots=needs[1],
        kernel_config=kernel_config,
    )
    _check_config(gemm)
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2]) if needs[0] else None
    dots = gemm.new_dots(has_bias=False) if needs[1] else None
    other = None if dots is None else input
    _launch(gemm, weight_scale, grad_rows, other, permute_x, dots)
    if grad_rows is not None:
        # In slot order the rows of a token are neighbours.
        grad_input = sum_rows(grad_rows, None, None, top_k) if permute_x else grad_rows
    if dots is not None and topk_weights is not None:
        grad_topk_weights = sum_parts(dots, topk_weights)
    return grad_input, grad_topk_weights


def _launch(
    gemm: GroupedGemm,
    b_scale: torch.Tensor,
    y: torch.Tensor | None,
    other: torch.Tensor | None = None,
    gather_other: bool = False,
    dots: torch.Tensor | None = None,
) -> None:
    """Do what GroupedGemm.launch does, for b in FP8 with b_scale (E, blocks of K, blocks of N).

    E experts; M, N, K are a GEMM's, as in _triton/gemm.py.
    """
    rows, block_m = gemm.rows, gemm.plan.tile[0]
    if rows.is_empty:
        if y is not None:
            y.zero_()
        return
    gemm.make_schedule(y, rows.gather if gemm.scatter_y else None)
    gemm.copy_operands()
    x_desc, b_desc = gemm.describe_operands(block_m)
    y_desc = gemm.describe_output(y, block_m)
    # In Triton's interpreter the kernel decodes bits, whatever the device.
    has_fp8 = gemm.device.capability >= (8, 9) and not gemm.device.is_interpreted
    launch(
        grouped_gemm_fp8_kernel, (gemm.programs,),
        gemm.x, x_desc, gemm.b, b_desc, b_scale, gemm.scale, rows.gather,
        y, y_desc, other, dots, *gemm.tile_arguments(),
        gemm.n, gemm.k, gemm.slots_per_weight, max(gemm.x_divisor, 1),
        rows.top_k if gather_other else 1,
        *gemm.x.stride(), *gemm.b.stride(), *b_scale.stride(),
        *strides(gemm.scale), *strides(other),
        HAS_FP8=has_fp8, **gemm.row_options(y, dots, gather_other), **gemm.options(),
        on=gemm.x, kernel_config=gemm.kernel_config,
    )  # fmt: skip


def _check_config(gemm: GroupedGemm) -> None:
    """Raise ValueError if this kernel cannot run the caller's configuration."""
    if gemm.kernel_config is None:
        return
    config = gemm.plan.config
    for name in ("BLOCK_N", "BLOCK_K"):
        if getattr(config, name) > BLOCK:
            raise ValueError(
                f"moe::grouped_gemm_fp8: expected {name} <= {BLOCK} in kernel_config, since a tile "
                f"has one scale of {BLOCK} x {BLOCK} weights at a time, got {getattr(config, name)}"
            )
    if gemm.plan.tail_tiles:
        raise ValueError(
            "moe::grouped_gemm_fp8: expected tail_tiles=False in kernel_config, since this op has no "
            "tiles of half the height, got True"
        )
