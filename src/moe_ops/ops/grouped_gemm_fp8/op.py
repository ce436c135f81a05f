# SPDX-License-Identifier: Apache-2.0
"""Register grouped_gemm_fp8: it multiplies each expert's rows by a quantised, frozen weight."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.grouped_gemm_fp8 import pytorch

_op = Op("grouped_gemm_fp8")
_op.implement("pytorch", pytorch.grouped_gemm_fp8)
_op.implement("triton", "moe_ops.ops.grouped_gemm_fp8.triton:grouped_gemm_fp8")

_dx_op = Op("grouped_gemm_fp8_dx")
_dx_op.implement("pytorch", pytorch.grouped_gemm_fp8_dx)
_dx_op.implement("triton", "moe_ops.ops.grouped_gemm_fp8.triton:grouped_gemm_fp8_dx")


def _save(ctx: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, weight_scale, token_counts, gather_indices, topk_weights, *flags, config = args
    need_topk_weights = ctx.needs[5]
    ctx.save_for_backward(
        input if need_topk_weights else None,
        weight,
        weight_scale,
        token_counts,
        gather_indices,
        topk_weights,
    )
    ctx.flags = flags
    ctx.config = config


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, weight, weight_scale, token_counts, gather_indices, topk_weights = ctx.saved_tensors
    needs = [ctx.needs[0], ctx.needs[5]]
    grad_input, grad_topk_weights = _dx_op.overload(
        grad_output, weight, weight_scale, token_counts, gather_indices, topk_weights, input,
        *ctx.flags, needs, ctx.config,
    )  # fmt: skip
    return grad_input, None, None, None, None, grad_topk_weights


_op.differentiate(_save, _backward)


@documented
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
    return _op.overload(
        input,
        weight,
        weight_scale,
        token_counts,
        gather_indices,
        topk_weights,
        top_k,
        permute_x,
        permute_y,
        kernel_config,
    )
