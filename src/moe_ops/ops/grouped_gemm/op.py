# SPDX-License-Identifier: Apache-2.0
"""Register grouped_gemm: it multiplies each expert's rows by that expert's weight."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented, is_transposed
from moe_ops.ops.grouped_gemm import pytorch
from moe_ops.ops.grouped_gemm.quantized import multiply_quantized
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("grouped_gemm")
_op.implement("pytorch", pytorch.grouped_gemm)
_op.implement("triton", "moe_ops.ops.grouped_gemm.triton:grouped_gemm")

_dx_op = Op("grouped_gemm_dx")
_dx_op.implement("pytorch", pytorch.grouped_gemm_dx)
_dx_op.implement("triton", "moe_ops.ops.grouped_gemm.triton:grouped_gemm_dx")

_dw_op = Op("grouped_gemm_dw")
_dw_op.implement("pytorch", pytorch.grouped_gemm_dw)
_dw_op.implement("triton", "moe_ops.ops.grouped_gemm.triton:grouped_gemm_dw")


def _save(ctx: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, token_counts, gather_indices, topk_weights, bias, *flags, config = args
    need_input, need_weight, _, _, need_topk_weights, need_bias, *_ = ctx.needs
    need_dx = need_input or need_topk_weights
    ctx.save_for_backward(
        input if need_weight or need_bias or need_topk_weights else None,
        weight if need_dx else None,
        token_counts,
        gather_indices,
        topk_weights,
        bias if need_topk_weights else None,
    )
    ctx.flags = flags
    ctx.config = config
    ctx.transposed = is_transposed(weight)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, weight, token_counts, gather_indices, topk_weights, bias = ctx.saved_tensors
    need_input, need_weight, _, _, need_topk_weights, need_bias, *_ = ctx.needs
    grad_input = grad_weight = grad_topk_weights = grad_bias = None
    routing = (token_counts, gather_indices, topk_weights)
    if need_input or need_topk_weights:
        needs = [need_input, need_topk_weights]
        # `input` may have been saved only for dW.
        x = input if need_topk_weights else None
        grad_input, grad_topk_weights = _dx_op.in_backward(
            grad_output, weight, *routing, x, bias, *ctx.flags, needs, ctx.config
        )
    if need_weight or need_bias:
        needs = [need_weight, need_bias]
        grad_weight, grad_bias = _dw_op.in_backward(
            grad_output, input, *routing, *ctx.flags, needs, ctx.transposed, ctx.config
        )
    return grad_input, grad_weight, None, None, grad_topk_weights, grad_bias


_op.differentiate(_save, _backward)


@documented
def grouped_gemm(
    input: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    others = (
        token_counts, gather_indices, topk_weights, bias, top_k, permute_x, permute_y, kernel_config
    )  # fmt: skip
    if isinstance(weight, QuantizedWeight):
        return multiply_quantized(input, weight, *others)
    return _op.overload(input, weight, *others)
