# SPDX-License-Identifier: Apache-2.0
"""Register grouped_gemm_quantized and its gradient: grouped_gemm's functions, with stored weights.

They decide how to read the weight. Nothing of its size is kept between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops._core.checks import is_matrix
from moe_ops._core.library import Op, function_of
from moe_ops.quantization.stored import NUM_STORED, StoredWeight
from moe_ops.quantization.weight import QuantizedWeight

_op = Op("grouped_gemm_quantized")
_dx_op = Op("grouped_gemm_quantized_dx")


def grouped_gemm_quantized(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    nested_scale: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    group_size: int,
    scale_encoding: str,
    token_counts: Tensor,
    gather_indices: Tensor | None = None,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
    *,
    by: str,
) -> Tensor:
    """Multiply with the function of `by`: pytorch or triton."""
    weight = StoredWeight(
        codes,
        scale,
        nested_scale,
        nested_offset,
        format,
        group_size,
        scale_encoding,
        input.shape[1],
    )
    output: Tensor = function_of(f"moe_ops.ops.grouped_gemm.{by}:grouped_gemm")(
        input, weight, token_counts, gather_indices, topk_weights, bias, top_k, permute_x, permute_y,
        kernel_config,
    )  # fmt: skip
    return output


def grouped_gemm_quantized_dx(
    grad_output: Tensor,
    codes: Tensor,
    scale: Tensor,
    nested_scale: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    group_size: int,
    scale_encoding: str,
    in_features: int,
    token_counts: Tensor,
    gather_indices: Tensor | None,
    topk_weights: Tensor | None,
    input: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
    *,
    by: str,
) -> tuple[Tensor, Tensor]:
    """Return grouped_gemm_dx with the function of `by`: pytorch or triton."""
    weight = StoredWeight(
        codes, scale, nested_scale, nested_offset, format, group_size, scale_encoding, in_features
    )
    grads: tuple[Tensor, Tensor] = function_of(f"moe_ops.ops.grouped_gemm.{by}:grouped_gemm_dx")(
        grad_output, weight, token_counts, gather_indices, topk_weights, input, bias, top_k,
        permute_x, permute_y, needs, kernel_config,
    )  # fmt: skip
    return grads


for _by in ("pytorch", "triton"):
    _op.implement(_by, grouped_gemm_quantized, by=_by)
    _dx_op.implement(_by, grouped_gemm_quantized_dx, by=_by)


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    input, *stored = args[: 1 + NUM_STORED]
    token_counts, gather_indices, topk_weights, bias, *flags, config = args[1 + NUM_STORED :]
    need_input, *_, need_topk_weights, need_bias = ctx.needs[: 1 + NUM_STORED + 4]
    tensors, layout = stored[:4], stored[4:]
    ctx.save_for_backward(
        input if need_bias or need_topk_weights else None,
        *(tensors if need_input or need_topk_weights else [None] * 4),
        token_counts,
        gather_indices,
        topk_weights,
        bias if need_topk_weights else None,
    )
    ctx.needed = need_input, need_topk_weights, need_bias
    ctx.layout, ctx.flags, ctx.config = (*layout, input.shape[1]), flags, config


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, *tensors, token_counts, gather_indices, topk_weights, bias = ctx.saved_tensors
    need_input, need_topk_weights, need_bias = ctx.needed
    grad_input = grad_topk_weights = grad_bias = None
    routing = (token_counts, gather_indices, topk_weights)
    if need_input or need_topk_weights:
        grad_input, grad_topk_weights = _dx_op.in_backward(
            grad_output, *tensors, *ctx.layout, *routing, input if need_topk_weights else None, bias,
            *ctx.flags, [need_input, need_topk_weights], ctx.config,
        )  # fmt: skip
    if need_bias:
        _, grad_bias = torch.ops.moe.grouped_gemm_dw.default(
            grad_output, input, *routing, *ctx.flags, [False, True], False, ctx.config
        )
    return grad_input, *[None] * (NUM_STORED + 2), grad_topk_weights, grad_bias


_op.differentiate(_save, _backward)


def multiply_quantized(input: Tensor, weight: QuantizedWeight, *others: Any) -> Tensor:
    """Call the op for grouped_gemm's arguments.

    Raises:
        ValueError: the weight has another width. A row's padding hides it from the op.
    """
    # Other rows the op itself refuses.
    if is_matrix(input):
        weight.check_width("moe::grouped_gemm", "weight", input.shape[1], "input.shape[1]")
    output: Tensor = _op.overload(input, *weight.stored, *others)
    return output
