# SPDX-License-Identifier: Apache-2.0
"""Launch Triton kernels: the current device, sizes, strides, and errors."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from moe_ops._triton.compiling import is_ahead
from moe_ops._triton.recorder import recorder
from moe_ops.configs.device import device_of

# Up to here a kernel that moves or sorts rows takes a few us.
_FEW_ROWS = 64


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own cdiv takes 1.5 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def strides(matrix: torch.Tensor | None) -> tuple[int, ...]:
    """Return the strides of a matrix, or (0, 0) for None."""
    return (0, 0) if matrix is None else matrix.stride()


def unit_of(*sizes: int) -> int:
    """Return 8 if it divides all sizes and 16 does not, else 1.

    Kernels take sizes in this unit (kernels/rows.py says why). Where 16 divides them, Triton learns
    that by itself.
    """
    if any(size % 8 for size in sizes) or not any(size % 16 for size in sizes):
        return 1
    # A size of 64 bits stays one: in units it might be taken for one of 32.
    return 8 if max(sizes) < 2**31 else 1


def follows(on: torch.Tensor, num_rows: int) -> dict[str, Any]:
    """Return the options of a kernel of so many rows that calls follow_on if PDL says so.

    Beside a short kernel it counts when the next one begins (docs/notes/decode.md).
    """
    if num_rows <= _FEW_ROWS and device_of(on.device).has_dependent_launch:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    on: torch.Tensor,
    kernel_config: str | None = None,
    **options: Any,
) -> None:
    """Launch a kernel on a tensor's device.

    Args:
        kernel: the @triton.jit function.
        grid: the number of programs in each dimension.
        arguments: the kernel's arguments.
        on: a tensor on the device.
        kernel_config: the caller's configurations, if the options follow from them.
        options: the kernel's constexpr arguments, and Triton's own options.

    Raises:
        ValueError: the caller's kernel_config does not fit the GPU.
    """
    device = on.device
    if is_ahead():
        kernel.warmup(*arguments, grid=grid, **options)
        return
    try:
        # Triton launches on the current device.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                compiled = kernel[grid](*arguments, **options)
        else:
            compiled = kernel[grid](*arguments, **options)
    except OutOfResources as error:
        if kernel_config is None:
            raise
        raise ValueError(
            f"moe_ops: kernel_config does not fit this GPU: {error}; use smaller blocks or fewer "
            "stages"
        ) from error
    if (watching := recorder()) is not None:
        watching.launched(kernel, compiled, grid, arguments)


def refuse_bf16(tensor: torch.Tensor) -> None:
    """Raise NotImplementedError if a bf16 product would be wrong or impossible here."""
    if tensor.dtype != torch.bfloat16:
        return
    capability = device_of(tensor.device).capability
    if capability == (0, 0):
        raise NotImplementedError(
            "moe_ops: bf16 in Triton's interpreter gives wrong products; use fp16 or fp32"
        )
    if capability < (8, 0):
        name = torch.cuda.get_device_name(tensor.device)
        raise NotImplementedError(
            f"moe_ops: bf16 on {name}: bf16 products need compute capability 8.0 or newer; use fp16"
        )


def precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input_precision; for fp32 it follows torch's own matmul setting."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
