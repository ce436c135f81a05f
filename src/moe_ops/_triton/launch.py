# SPDX-License-Identifier: Apache-2.0
"""What every launch needs: the device, sizes, strides."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from moe_ops.configs.device import device_of


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
