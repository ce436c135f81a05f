# SPDX-License-Identifier: Apache-2.0
"""Launch the kernel that dequantises weights.

E num_experts, N out_features, D in_features, G blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops._triton.kernels.dequantize import (
    NUM_CODES,
    _dequantize_fwd_kernel,
    _dequantize_write_tables_kernel,
)
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, unit_of
from moe_ops.configs.device import device_of
from moe_ops.quantization.codes import Codes, Nibbles
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.scales import BFLOAT16, DYNAMIC_CODE, FLOAT32, NESTED, aligned

# A program of four warps reads 16 bytes of codes in each thread.
_WARPS = 4
_BYTES = _WARPS * 32 * 16
# It reads at least so many neighbouring elements of a row: whole lines of 128 bytes.
_LEAST_RUN = 256
# As what the kernel reads scales of more than one byte. It widens bf16 itself.
_DTYPES = {FLOAT32.name: torch.float32, BFLOAT16.name: torch.int16}


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    nested_scale: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    group_size: int,
    scale_encoding: str,
    in_features: int,
    output_dtype: torch.dtype,
) -> Tensor:
    num_experts, out_features, row_bytes = codes.shape
    output = codes.new_empty(num_experts, out_features, in_features, dtype=output_dtype)
    if not output.numel():
        return output
    declared = FORMATS[format]
    num_rows, num_groups = num_experts * out_features, cdiv(in_features, group_size)
    rows, block_g = _tile(num_groups, group_size, _BYTES * 8 // declared.codes.bits)
    unit = unit_of(in_features, row_bytes)
    device = device_of(codes.device)
    launch(
        _dequantize_fwd_kernel, (cdiv(num_rows, rows), cdiv(num_groups, block_g)),
        codes.contiguous(), _numbers(scale, _DTYPES.get(scale_encoding, torch.uint8)),
        _numbers(nested_scale, torch.float32), _numbers(nested_offset, torch.float32),
        _tables(codes, declared.codes, scale_encoding), output,
        num_rows, out_features, in_features // unit, row_bytes // unit, num_groups,
        BITS=declared.codes.bits,
        LOW_FIRST=isinstance(declared.codes, Nibbles) and declared.codes.low_first,
        ENCODING=scale_encoding, GROUP=group_size, BLOCK_ROWS=declared.block_rows,
        ROWS=rows, BLOCK_G=block_g, UNIT=unit,
        HAS_FP8=device.capability >= (8, 9) and not device.is_interpreted,
        # A nested scale is rounded between its product and its sum.
        num_warps=_WARPS, enable_fp_fusion=False,
        on=codes,
    )  # fmt: skip
    return output


def _tile(num_groups: int, group_size: int, size: int) -> tuple[int, int]:
    """Return the rows, and the blocks of each, of a tile of `size` elements.

    Of the widths that leave the fewest elements idle at the end of a row, it takes the largest.
    """
    widest = min(next_power_of_2(num_groups), size // group_size)
    widths = [widest]
    while widths[-1] * group_size > _LEAST_RUN:
        widths.append(widths[-1] // 2)
    width = min(widths, key=lambda blocks: cdiv(num_groups, blocks) * blocks)
    return size // group_size // width, width


def _numbers(stored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if stored is None else aligned(stored).view(dtype)


def _tables(like: Tensor, codes: Codes, encoding: str) -> Tensor | None:
    """Return the values of codes and of nested scales, for the kernel to look up.

    A launch writes them. A tensor that is made once would not be replayed: no record holds one.
    """
    if not isinstance(codes, Nibbles) and encoding != NESTED.name:
        return None
    values = codes.table if isinstance(codes, Nibbles) else (0.0,) * NUM_CODES.value
    values = (*values, *DYNAMIC_CODE) if encoding == NESTED.name else values
    tables = like.new_empty(next_power_of_2(len(values)), dtype=torch.float32)
    launch(
        _dequantize_write_tables_kernel, (1,), tables,
        VALUES=values, NUM_VALUES=len(values), BLOCK=tables.numel(), on=tables,
    )  # fmt: skip
    return tables
