# SPDX-License-Identifier: Apache-2.0
"""What the triton.py of several ops share: the device, and the kernels that move rows."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from moe_ops._triton.kernels.rows import (
    copy_rows_kernel,
    gather_rows_kernel,
    invert_permutation_kernel,
    sum_rows_kernel,
)
from moe_ops.configs.choose import device_of


@dataclass(frozen=True)
class Activation:
    """An activation and the limit of what it is applied to, as kernels take them."""

    name: str
    limit: float | None

    @property
    def bound(self) -> float:
        """The argument `limit`, which is read where there is a limit."""
        return 0.0 if self.limit is None else self.limit

    @property
    def options(self) -> dict[str, Any]:
        """The constexpr arguments."""
        return {"ACTIVATION": self.name, "HAS_LIMIT": self.limit is not None}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, takes a microsecond and a half."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def strides(matrix: torch.Tensor | None) -> tuple[int, ...]:
    """Of a matrix; zeros where there is none."""
    return (0, 0) if matrix is None else matrix.stride()


def launch_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on the current device."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def refuse_bf16(tensor: torch.Tensor) -> None:
    """Raises NotImplementedError where a product of bf16 would be wrong or is not to be had."""
    if tensor.dtype != torch.bfloat16:
        return
    capability = device_of(tensor.device).capability
    if capability == (0, 0):
        raise NotImplementedError(
            "moe_ops: bf16 in Triton's interpreter: its tl.dot gives wrong values; use fp16 or fp32"
        )
    if capability < (8, 0):
        name = torch.cuda.get_device_name(tensor.device)
        raise NotImplementedError(
            f"moe_ops: bf16 on {name}: products of bf16 need compute capability 8.0; use fp16"
        )


def inverse_permutation(indices: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation (R,), int32: inverse[indices[i]] = i."""
    num_rows = indices.shape[0]
    inverse = torch.empty(num_rows, dtype=torch.int32, device=indices.device)
    if num_rows > 0:
        block = 1024
        with launch_on(indices):
            invert_permutation_kernel[(cdiv(num_rows, block),)](
                indices.contiguous(), inverse, num_rows, BLOCK=block
            )
    return inverse


def copy_rows(input: torch.Tensor, rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """output[rows[t * top_k + k]] = input[t]: (T, H) -> (T * top_k, H)."""
    num_tokens, hidden_size = input.shape
    output = input.new_empty(num_tokens * top_k, hidden_size)
    if output.numel() == 0:
        return output
    # Whole rows, where registers allow: what a program writes is then one piece of memory a row.
    block_h = min(4096, next_power_of_2(hidden_size))
    with launch_on(input):
        copy_rows_kernel[(num_tokens, cdiv(hidden_size, block_h))](
            input, rows.contiguous(), output, *input.stride(), output.shape[0], hidden_size, top_k,
            BLOCK_H=block_h, num_warps=8 if block_h == 4096 else 4,
        )  # fmt: skip
    return output


def sum_rows(
    input: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    top_k: int,
    used_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """output[t] = sum_k weights[t, k] * input[rows[t * top_k + k]]: (T * top_k, H) -> (T, H).

    Rows from used_rows[0] on count as zeros, where it is given.
    """
    num_rows, hidden_size = input.shape
    output = input.new_empty(num_rows // top_k, hidden_size)
    if output.numel() == 0:
        return output
    block_h = min(1024, next_power_of_2(hidden_size))
    with launch_on(input):
        sum_rows_kernel[(output.shape[0], cdiv(hidden_size, block_h))](
            input, rows.contiguous(), weights, used_rows, output,
            *input.stride(), *strides(weights),
            num_rows, hidden_size,
            TOP_K=top_k, BLOCK_H=block_h, HAS_WEIGHTS=weights is not None,
            HAS_USED=used_rows is not None,
        )  # fmt: skip
    return output


def gather_rows(
    input: torch.Tensor,
    gather_indices: torch.Tensor | None,
    weights: torch.Tensor | None,
    top_k: int,
    divisor: int = 0,
) -> torch.Tensor:
    """output[i] = weights[slot] * input[slot // divisor], slot = gather_indices[i] or i.

    With divisor 0 the rows stay where they are: output[i] = weights[slot] * input[i].
    """
    hidden_size = input.shape[1]
    num_rows = input.shape[0] * max(divisor, 1)
    output = input.new_empty(num_rows, hidden_size)
    if output.numel() == 0:
        return output
    block_h = min(2048, next_power_of_2(hidden_size))
    with launch_on(input):
        gather_rows_kernel[(num_rows, cdiv(hidden_size, block_h))](
            input, None if gather_indices is None else gather_indices.contiguous(), weights, output,
            *input.stride(), *strides(weights),
            num_rows, hidden_size, max(divisor, 1), top_k,
            HAS_GATHER=gather_indices is not None, MOVES=divisor > 0,
            HAS_WEIGHTS=weights is not None, BLOCK_H=block_h,
        )  # fmt: skip
    return output
