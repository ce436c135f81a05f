# SPDX-License-Identifier: Apache-2.0
"""Launch the kernels that move and sum rows.

T num_tokens, R = T * top_k routed rows, H hidden_size.
"""

from __future__ import annotations

import torch

from moe_ops._triton.kernels.rows import (
    copy_rows_kernel,
    gather_rows_kernel,
    invert_permutation_kernel,
    shift_rows_kernel,
    sum_parts_kernel,
    sum_rows_kernel,
)
from moe_ops._triton.launch import cdiv, follows, launch, next_power_of_2, strides, unit_of
from moe_ops.configs.device import device_of

# Bytes of a sector, the least that the L2 cache hands out.
_SECTOR = 32


def new_rows(like: torch.Tensor, num_rows: int, width: int) -> torch.Tensor:
    """Return an uninitialised matrix (num_rows, width) whose rows begin at sectors.

    Of a row that begins within a sector, each 128 bytes are read as five sectors in place of four.
    docs/notes/descriptors.md has what that costs a product.
    """
    per_sector = _SECTOR // like.itemsize
    stride = cdiv(width, per_sector) * per_sector
    rows = like.new_empty(num_rows, stride)
    return rows if stride == width else rows[:, :width]


def inverse_permutation(indices: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a permutation (R,), int32: inverse[indices[i]] = i."""
    num_rows = indices.shape[0]
    inverse = torch.empty(num_rows, dtype=torch.int32, device=indices.device)
    if num_rows > 0:
        block = 1024
        launch(
            invert_permutation_kernel, (cdiv(num_rows, block),),
            indices.contiguous(), inverse, num_rows, BLOCK=block,
            on=indices,
        )  # fmt: skip
    return inverse


def copy_rows(
    input: torch.Tensor, rows: torch.Tensor, top_k: int, is_operand: bool = False
) -> torch.Tensor:
    """Copy rows: output[rows[t * top_k + k]] = input[t], (T, H) -> (T * top_k, H).

    For an operand of a product the result's rows begin at sectors; else it is contiguous.
    """
    num_tokens, hidden_size = input.shape
    num_rows = num_tokens * top_k
    if is_operand:
        output = new_rows(input, num_rows, hidden_size)
    else:
        output = input.new_empty(num_rows, hidden_size)
    if output.numel() == 0:
        return output
    # A program copies whole rows if registers allow: each write is then one piece of memory.
    block_h = min(4096, next_power_of_2(hidden_size))
    stride, stride_out = input.stride(0), output.stride(0)
    unit = unit_of(stride, stride_out, hidden_size)
    launch(
        copy_rows_kernel, (num_tokens, cdiv(hidden_size, block_h)),
        input, rows.contiguous(), output, stride // unit, input.stride(1), stride_out // unit,
        num_rows, hidden_size // unit, top_k,
        BLOCK_H=block_h, UNIT=unit, num_warps=8 if block_h == 4096 else 4,
        on=input,
    )  # fmt: skip
    return output


def sum_rows(
    input: torch.Tensor,
    rows: torch.Tensor | None,
    weights: torch.Tensor | None,
    top_k: int,
    used_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum rows: output[t] = sum_k weights[t, k] * input[rows[t * top_k + k]].

    (T * top_k, H) -> (T, H). Without `rows` the rows are in slot order. The numbers in used_rows sum
    to the rows that belong to an expert, such as the experts' token counts: those behind them count as
    zeros. Without them all weights are read, also those of dropped slots, which may be NaN.
    """
    num_rows, hidden_size = input.shape
    output = input.new_empty(num_rows // top_k, hidden_size)
    if output.numel() == 0:
        return output
    block_h = min(1024, next_power_of_2(hidden_size))
    if output.shape[0] * cdiv(hidden_size, block_h) < device_of(input.device).num_sms:
        # More programs, each with less to wait for.
        block_h = min(256, block_h)
    stride = input.stride(0)
    unit = unit_of(stride, hidden_size)
    num_used = 0 if used_rows is None else used_rows.numel()
    launch(
        sum_rows_kernel, (output.shape[0], cdiv(hidden_size, block_h)),
        input, None if rows is None else rows.contiguous(), weights, used_rows, output,
        stride // unit, input.stride(1), *strides(weights), num_rows, hidden_size // unit,
        TOP_K=top_k, BLOCK_H=block_h, HAS_ROWS=rows is not None, HAS_WEIGHTS=weights is not None,
        NUM_USED=num_used, BLOCK_USED=next_power_of_2(num_used), UNIT=unit,
        **follows(input, num_rows),
        on=input,
    )  # fmt: skip
    return output


def gather_rows(
    input: torch.Tensor,
    gather_indices: torch.Tensor | None,
    weights: torch.Tensor | None,
    top_k: int,
    divisor: int = 0,
) -> torch.Tensor:
    """Gather rows for a product: output[i] = weights[slot] * input[slot // divisor].

    slot is gather_indices[i], or i without them. With divisor 0 rows keep their places:
    output[i] = weights[slot] * input[i]. The result's rows begin at sectors.
    """
    hidden_size = input.shape[1]
    num_rows = input.shape[0] * max(divisor, 1)
    output = new_rows(input, num_rows, hidden_size)
    if output.numel() == 0:
        return output
    if weights is None and _must_shift(input):
        block = min(512, next_power_of_2(cdiv(hidden_size, 4)))
        launch(
            shift_rows_kernel, (num_rows, cdiv(hidden_size, 4 * block)),
            input, None if gather_indices is None else gather_indices.contiguous(), output,
            input.stride(0), output.stride(0), num_rows, hidden_size, max(divisor, 1),
            HAS_GATHER=gather_indices is not None, MOVES=divisor > 0, BLOCK=block,
            on=input,
        )  # fmt: skip
        return output
    block_h = min(2048, next_power_of_2(hidden_size))
    stride, stride_out = input.stride(0), output.stride(0)
    unit = unit_of(stride, stride_out, hidden_size)
    launch(
        gather_rows_kernel, (num_rows, cdiv(hidden_size, block_h)),
        input, None if gather_indices is None else gather_indices.contiguous(), weights, output,
        stride // unit, input.stride(1), stride_out // unit, *strides(weights),
        num_rows, hidden_size // unit, max(divisor, 1), top_k,
        HAS_GATHER=gather_indices is not None, MOVES=divisor > 0,
        HAS_WEIGHTS=weights is not None, BLOCK_H=block_h, UNIT=unit,
        on=input,
    )  # fmt: skip
    return output


def in_expert_order(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    scatter_indices: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copy the rows of tokens (T, H) into expert order (R, H), times the slots' weights if given.

    The result's rows begin at sectors.
    """
    if weights is None and not _must_shift(input):
        return copy_rows(input, scatter_indices, top_k, is_operand=True)
    return gather_rows(input, gather_indices, weights, top_k, top_k)


def _must_shift(rows: torch.Tensor) -> bool:
    """Return whether rows of 16 bits begin elsewhere than at multiples of 16 bytes."""
    stride, (_, width) = rows.stride(), rows.shape
    is_aligned = rows.data_ptr() % 16 == 0 and stride[0] % 8 == 0 and width % 8 == 0
    return rows.itemsize == 2 and stride[1] == 1 and not is_aligned


def sum_parts(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum the rows of a matrix (P, R); the result has the shape and dtype of `like`.

    The parts are fp32; a single one that has the dtype already is the sum.
    """
    num_parts, width = parts.shape
    if num_parts == 1 and parts.dtype == like.dtype:
        return parts.view(like.shape)
    output = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if width > 0:
        block = 256
        launch(
            sum_parts_kernel, (cdiv(width, block),),
            parts, output, num_parts, width, BLOCK=block,
            on=parts,
        )  # fmt: skip
    return output
