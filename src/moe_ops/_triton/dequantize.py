# SPDX-License-Identifier: Apache-2.0
"""Launch the kernel that dequantises weights.

E num_experts, N out_features, D in_features, G blocks of a row.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops._triton.code_book import CodeBook, decoding_ptx, table_ptx
from moe_ops._triton.kernels.dequantize import (
    _dequantize_fwd_kernel,
    _dequantize_write_table_kernel,
)
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, unit_of
from moe_ops.configs.device import device_of
from moe_ops.quantization.codes import Nibbles
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.scales import BFLOAT16, DYNAMIC_CODE, E8M0, FLOAT32, NESTED, aligned
from moe_ops.quantization.stored import StoredWeight

# A program of four warps reads 16 bytes of codes in each thread.
_WARPS = 4
_BYTES = _WARPS * 32 * 16
# It reads at least so many neighbouring elements of a row: whole lines of 128 bytes.
_LEAST_RUN = 256
# Encodings whose scales bf16 holds.
_IN_BF16 = (BFLOAT16.name, E8M0.name)
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
    output = codes.new_empty(*codes.shape[:2], in_features, dtype=output_dtype)
    if output.numel():
        weight = StoredWeight(
            codes, scale, nested_scale, nested_offset, format, group_size, scale_encoding,
            in_features,
        )  # fmt: skip
        StoredForKernel.of(weight).dequantize(0, output)
    return output


@dataclass(slots=True)
class StoredForKernel:
    """A quantised weight in the form that kernels read.

    Attributes:
        weight: its tensors are contiguous, and those of numbers begin where numbers may.
        nested_table: what the bytes of its nested scales mean, or None.
    """

    weight: StoredWeight
    nested_table: Tensor | None

    @classmethod
    def of(cls, weight: StoredWeight, nested_table: Tensor | None = None) -> StoredForKernel:
        """Prepare a weight that has elements. It launches what writes a table that is not given."""
        codes = FORMATS[weight.format].codes
        tensors = (
            # Words of eight codes. Codes of eight bits are read as bytes.
            weight.codes.contiguous() if codes.bits == 8 else _numbers(weight.codes, torch.int32),
            _numbers(weight.scale, _DTYPES.get(weight.scale_encoding, torch.uint8)),
            _numbers(weight.nested_scale, torch.float32),
            _numbers(weight.nested_offset, torch.float32),
        )
        if weight.scale_encoding != NESTED.name:
            nested_table = None
        elif nested_table is None:
            nested_table = _nested_table(weight.codes)
        return cls(StoredWeight._make((*tensors, *weight[4:])), nested_table)

    def tensors(self, first: int = 0) -> tuple[Tensor | None, ...]:
        """Return the kernels' tensor arguments: the stored ones from an expert on, and the table."""
        return (*(None if t is None else t[first:] for t in self.weight[:4]), self.nested_table)

    @property
    def sizes(self) -> tuple[int, int]:
        """Return B and G: the bytes and the blocks of a row."""
        codes = self.weight.codes
        return codes.shape[2] * codes.itemsize, cdiv(
            self.weight.in_features, self.weight.group_size
        )

    def options(self) -> dict[str, Any]:
        """Return the kernels' constexpr arguments that say how to read the tensors."""
        format, group_size, encoding, _ = self.weight[4:]
        declared, device = FORMATS[format], device_of(self.weight.codes.device)
        nibbles = declared.codes if isinstance(declared.codes, Nibbles) else None
        return {
            "BITS": declared.codes.bits,
            "LOW_FIRST": nibbles is not None and nibbles.low_first,
            "VALUES": () if nibbles is None else _bits(nibbles.table),
            "ENCODING": encoding, "GROUP": group_size, "BLOCK_ROWS": declared.block_rows,
            "HAS_FP8": device.capability >= (8, 9) and not device.is_interpreted,
        }  # fmt: skip

    def ptx(self) -> dict[str, Any]:
        """Return the constexpr arguments that decode codes of four bits; "" where nothing runs PTX."""
        codes = FORMATS[self.weight.format].codes
        if not isinstance(codes, Nibbles) or device_of(self.weight.codes.device).is_interpreted:
            return {"PTX": "", "TABLE_PTX": "", "UNIT": None}
        book = CodeBook.of(codes.table, self.weight.scale_encoding in _IN_BF16)
        ptx = decoding_ptx(book, codes.low_first)
        return {"PTX": ptx, "TABLE_PTX": table_ptx(book), "UNIT": book.unit}

    def dequantize(self, first: int, output: Tensor) -> None:
        """Write the experts from `first` on to output (experts, N, D).

        Its rows are contiguous, and so are its experts; a row's stride may be larger than D.
        """
        num_experts, out_features, in_features = output.shape
        row_bytes, num_groups = self.sizes
        bits = FORMATS[self.weight.format].codes.bits
        num_rows, group_size = num_experts * out_features, self.weight.group_size
        rows, block_g = _tile(num_groups, group_size, _BYTES * 8 // bits)
        stride = output.stride(1)
        unit = unit_of(in_features, row_bytes, stride)
        launch(
            _dequantize_fwd_kernel, (cdiv(num_rows, rows), cdiv(num_groups, block_g)),
            *self.tensors(first), output, num_rows, out_features, in_features // unit,
            row_bytes // unit, num_groups, stride // unit,
            ROWS=rows, BLOCK_G=block_g, UNIT=unit, num_warps=_WARPS,
            # A nested scale is rounded between its product and its sum.
            enable_fp_fusion=False,
            **self.options(),
            on=output,
        )  # fmt: skip


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


@functools.cache
def _bits(values: tuple[float, ...]) -> tuple[int, ...]:
    """Return the bits of fp32 numbers, as kernels take constants."""
    return struct.unpack(f"{len(values)}i", struct.pack(f"{len(values)}f", *values))


def _nested_table(like: Tensor) -> Tensor:
    """Return the values of the bytes of nested scales, for the kernel to look up.

    A launch writes them. A tensor that is made once would not be replayed: no record holds one.
    """
    table = like.new_empty(len(DYNAMIC_CODE), dtype=torch.float32)
    launch(
        _dequantize_write_table_kernel, (1,), table,
        BITS=_bits(DYNAMIC_CODE), SIZE=table.numel(), on=table,
    )  # fmt: skip
    return table
