# SPDX-License-Identifier: Apache-2.0
"""Run grouped_gemm, its dX and its dW in Triton: move rows where needed, and launch the GEMMs."""

from __future__ import annotations

import torch

from moe_ops._triton.gemm import GroupedGemm
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, precision
from moe_ops._triton.quantized import DecodingGemm
from moe_ops._triton.rows import gather_rows, sum_parts, sum_rows
from moe_ops._triton.schedule import Rows, expert_offsets
from moe_ops._triton.weight_gradient import grad_bias, grad_weight
from moe_ops.ops.grouped_gemm.kernels import _add_low_rank_kernel, _scale_kernel
from moe_ops.quantization.stored import StoredWeight


def grouped_gemm(
    input: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    divisor = top_k if permute_x else 0
    if not isinstance(weight, torch.Tensor):
        decoding = DecodingGemm.where_planned(
            input, weight, rows, kernel_config, x_divisor=divisor, bias=bias
        )
        if decoding is not None:
            output = input.new_empty(num_rows, weight.shape[1])
            decoding.launch(output, scale=topk_weights, scatter_y=permute_y)
            return output
    gemm = GroupedGemm(
        "forward",
        input,
        weight,
        rows,
        x_divisor=divisor,
        scale=topk_weights,
        bias=bias,
        scatter_y=permute_y,
        kernel_config=kernel_config,
    )
    output = input.new_empty(num_rows, weight.shape[1])
    gemm.launch(output)
    return output


def grouped_gemm_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor | StoredWeight,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    input: torch.Tensor | None,
    bias: torch.Tensor | None,
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
        weight,
        Rows.of(token_counts, num_rows, gather_indices, top_k),
        x_divisor=1 if permute_y else 0,
        scale=topk_weights,
        scatter_y=permute_x,
        has_dots=needs[1],
        kernel_config=kernel_config,
    )
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2]) if needs[0] else None
    dots = gemm.new_dots(bias is not None) if needs[1] else None
    other = None if dots is None else input
    gemm.launch(grad_rows, other=other, gather_other=permute_x, dots=dots)
    if grad_rows is not None:
        # In slot order the rows of a token are neighbours.
        grad_input = sum_rows(grad_rows, None, None, top_k) if permute_x else grad_rows
    if dots is not None and topk_weights is not None:
        if bias is not None:
            gemm.launch_bias_dots(bias, dots[-1])
        grad_topk_weights = sum_parts(dots, topk_weights)
    return grad_input, grad_topk_weights


def grouped_gemm_dw(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_w, grad_b = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_w, grad_b
    # Gathering rows inside this GEMM would halve its speed, so they are copied first.
    g, x = grad_output, input
    if permute_y or topk_weights is not None:
        divisor = 1 if permute_y else 0
        g = gather_rows(g, gather_indices, topk_weights, top_k, divisor)
    offsets = expert_offsets(token_counts, g.shape[0])
    if needs[0]:
        if permute_x:
            x = gather_rows(input, gather_indices, None, top_k, top_k)
        grad_w = grad_weight(g, x, offsets, transposed, kernel_config)
    if needs[1]:
        grad_b = grad_bias(g, offsets)
    return grad_w, grad_b


def grouped_gemm_lora(
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
    *,
    for_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    divisor = top_k if permute_x else 0
    thin = GroupedGemm("forward", input, lora_a, rows, x_divisor=divisor)
    base = GroupedGemm(
        "forward", input, weight, rows,
        x_divisor=divisor, bias=bias, scatter_y=permute_y, kernel_config=kernel_config,
    )  # fmt: skip
    low_rank = input.new_empty(num_rows, lora_a.shape[1])
    thin.launch(low_rank)
    _scale(low_rank, scaling)
    output = input.new_empty(num_rows, weight.shape[1])
    base.launch(output)
    _add_low_rank(base, low_rank, lora_b.transpose(1, 2), output)
    return (output, low_rank) if for_backward else output


def grouped_gemm_lora_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor | None,
    low_rank: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_input, grad_a, grad_b = (grad_output.new_empty(0) for _ in needs)
    if not any(needs):
        return grad_input, grad_a, grad_b
    need_input, need_a, need_b = needs
    num_rows = grad_output.shape[0]
    rows = Rows.of(token_counts, num_rows, gather_indices, top_k)
    g, divisor = grad_output, 1 if permute_y else 0
    if permute_y and need_b:
        # dW needs its rows in expert order, and then they serve all products.
        g, divisor = gather_rows(g, gather_indices, None, 1, 1), 0
    offsets = expert_offsets(token_counts, num_rows) if need_a or need_b else None
    if need_input or need_a:
        thin = GroupedGemm("backward_dX", g, lora_b, rows, x_divisor=divisor)
        t = g.new_empty(num_rows, lora_a.shape[1])
        thin.launch(t)
        _scale(t, scaling)
        if need_input:
            base = GroupedGemm(
                "backward_dX", g, weight, rows,
                x_divisor=divisor, scatter_y=permute_x, kernel_config=kernel_config,
            )  # fmt: skip
            grad_rows = g.new_empty(num_rows, weight.shape[2])
            base.launch(grad_rows)
            _add_low_rank(base, t, lora_a, grad_rows)
            # In slot order the rows of a token are neighbours.
            grad_input = sum_rows(grad_rows, None, None, top_k) if permute_x else grad_rows
        if need_a:
            assert input is not None  # the schema's `where` says so
            assert offsets is not None
            x = gather_rows(input, gather_indices, None, top_k, top_k) if permute_x else input
            grad_a = grad_weight(t, x, offsets, False)
    if need_b:
        assert low_rank is not None
        assert offsets is not None
        grad_b = grad_weight(g, low_rank, offsets, False)
    return grad_input, grad_a, grad_b


def _scale(rows: torch.Tensor, factor: float) -> None:
    """Multiply a new, contiguous tensor by a factor."""
    if rows.numel() == 0 or factor == 1:
        return
    block = 1024
    launch(
        _scale_kernel,
        (cdiv(rows.numel(), block),),
        rows,
        rows.numel(),
        factor,
        BLOCK=block,
        on=rows,
    )


def _add_low_rank(
    base: GroupedGemm, low: torch.Tensor, factor: torch.Tensor, y: torch.Tensor
) -> None:
    """Add low[row] @ factor[e] to the rows that `base` has stored in y; factor is (E, L, N)."""
    rows, schedule = base.rows, base.schedule
    _, rank, width = factor.shape
    if rows.is_empty or y.numel() == 0 or rank == 0:
        return
    block_m = 32 if schedule is None else schedule.block_m
    block_n = min(64, max(16, next_power_of_2(width)))
    tiles, max_tiles = (None, 0) if schedule is None else (schedule.tiles, schedule.max_tiles)
    programs = base.device.num_sms * 4
    launch(
        _add_low_rank_kernel, (min(programs, rows.max_tiles(block_m) * cdiv(width, block_n)),),
        low, factor, rows.gather, y, rows.token_counts, tiles, max_tiles, rows.num_rows,
        rows.num_experts, width, rank, *factor.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_L=min(64, max(16, next_power_of_2(rank))),
        GROUP_M=8, PRECISION=precision(y.dtype),
        EXPERTS=next_power_of_2(rows.num_experts) if schedule is None else 1,
        FINDS_TILES=schedule is None, SCATTER=base.scatter_y, num_warps=8 if block_m > 64 else 4,
        on=y,
    )  # fmt: skip
