# SPDX-License-Identifier: Apache-2.0
"""Make and decode weights in FP8 that have one scale for each block.

E num_experts, N out_features, D in_features. A weight (..., N, D) is torch.float8_e4m3fn. Its scale
(..., ceil(N / 128), ceil(D / 128)) is fp32. The value of an element is its code's value times its
block's scale.

Source: the format of DeepSeek-V3's checkpoints (arXiv:2412.19437). They call the scale
weight_scale_inv.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moe_ops._core.checks import check_tensor, check_weight_dtype, dtype_name
from moe_ops._core.sharded import refuse_sharded

BLOCK = 128
# The largest number in float8_e4m3fn.
_LARGEST = 448.0


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight to float8_e4m3fn with one scale for each block of 128 x 128.

        weight_scale[b] = max |weight| in block b / 448, 1 where the block is zero
        weight_fp8      = weight / weight_scale, rounded to the nearest

    The error of a weight is at most 2**-4 of the weight, or for a small one 2**-10 of its block's
    scale.

    Args:
        weight (Tensor (..., N, D), floating): any number of matrices, in any strides. The experts'
            weights are (E, N, D). A NaN or an infinity makes its block NaN.

    Returns:
        weight_fp8 (Tensor (..., N, D), float8_e4m3fn): contiguous.
        weight_scale (Tensor (..., ceil(N / 128), ceil(D / 128)), float32): the scale of each block.

    Raises:
        TypeError: weight is not floating, it is FP8 already, or it is a DTensor.
        ValueError: weight has fewer than two dimensions.

    Not differentiable. Deterministic bit for bit. moe_ops.QuantizedWeight.from_fp8_block takes
    both results. moe_ops.dequantize_fp8 undoes all but the rounding.

    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.
    """
    function = "moe_ops.quantize_fp8"
    check_tensor(function, "weight", weight)
    refuse_sharded(function, "weight", weight, "quantise it")
    check_weight_dtype(function, weight.dtype, "weight.dtype")
    if weight.dim() < 2:
        raise ValueError(
            f"{function}: expected weight.dim() >= 2, got {weight.dim()} {tuple(weight.shape)}"
        )
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    *_, rows, columns = weight.shape
    scale = torch.empty(_scale_shape(weight), dtype=torch.float32, device=weight.device)
    # One matrix at a time, so that temporaries are no larger than one matrix.
    for matrix, into, scales in _matrices(weight.detach(), quantised, scale):
        values = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
        blocks = torch.nn.functional.pad(values.abs(), padding)
        blocks = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        largest = blocks.amax(dim=(1, 3))
        scales.copy_((largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        scales.masked_fill_(largest == 0, 1.0)
        into.copy_((values / _spread(scales, rows, columns)).clamp(-_LARGEST, _LARGEST))
    return quantised, scale


def dequantize_fp8(
    weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Multiply FP8 weights by the scales of their blocks, and round to `dtype`.

        output[n, d] = weight[n, d] * weight_scale[n // 128, d // 128]

    Args:
        weight (Tensor (..., N, D), float8_e4m3fn): any number of matrices, in any strides.
        weight_scale (Tensor (..., ceil(N / 128), ceil(D / 128)), float32): their scales.
        dtype (torch.dtype): the result's dtype. The product is taken in fp32, for fp64 in fp64.

    Returns:
        output (Tensor (..., N, D), dtype): contiguous. moe_ops.grouped_gemm takes it.

    Raises:
        TypeError: weight or weight_scale has another dtype; dtype is not a floating one of 16 bits
            or more.
        ValueError: weight has fewer than two dimensions; weight_scale has another shape, or is on
            another device.

    Not differentiable. Deterministic bit for bit.

    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.
    """
    function = "moe_ops.dequantize_fp8"
    for name, tensor, expected in (
        ("weight", weight, torch.float8_e4m3fn),
        ("weight_scale", weight_scale, torch.float32),
    ):
        check_tensor(function, name, tensor)
        if tensor.dtype != expected:
            raise TypeError(
                f"{function}: expected {name}.dtype == {dtype_name(expected)}, got "
                f"{dtype_name(tensor.dtype)}"
            )
    check_weight_dtype(function, dtype)
    if weight.dim() < 2:
        raise ValueError(
            f"{function}: expected weight.dim() >= 2, got {weight.dim()} {tuple(weight.shape)}"
        )
    if weight_scale.device != weight.device:
        raise ValueError(
            f"{function}: expected weight_scale.device == weight.device "
            f"({weight.device}), got {weight_scale.device}"
        )
    shape = _scale_shape(weight)
    if tuple(weight_scale.shape) != shape:
        raise ValueError(
            f"{function}: expected weight_scale.shape == {shape}, one scale for each "
            f"block of 128 x 128 weights, got {tuple(weight_scale.shape)}"
        )
    output = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for matrix, scales, into in _matrices(weight.detach(), weight_scale.detach(), output):
        into.copy_(dequantized(matrix, scales, torch.promote_types(dtype, torch.float32)))
    return output


def dequantized(
    weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return weight (N, D) times its scales, (N, D), in `dtype`: fp32 or fp64."""
    return weight.to(dtype).mul_(_spread(weight_scale.to(dtype), *weight.shape))


def _scale_shape(weight: torch.Tensor) -> tuple[int, ...]:
    *outer, rows, columns = weight.shape
    return (*outer, -(-rows // BLOCK), -(-columns // BLOCK))


def _matrices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return the matrices of tensors (..., rows, columns) of equal outer sizes, one by one."""
    outer = math.prod(tensors[0].shape[:-2])
    return zip(*(tensor.reshape(outer, *tensor.shape[-2:]) for tensor in tensors), strict=True)


def _spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scale of each element, (rows, columns)."""
    scales = scales.repeat_interleave(BLOCK, 0)[:rows]
    return scales.repeat_interleave(BLOCK, 1)[:, :columns]
