# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller gave to functions that are no ops, in the words of the ops' own errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_weight_dtype(function: str, dtype: torch.dtype, name: str = "dtype") -> None:
    """Refuse a dtype that a weight cannot have.

    Raises:
        TypeError: it is not a floating one of 16 bits or more.
    """
    is_dtype = isinstance(dtype, torch.dtype)
    if not is_dtype or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"{function}: expected {name} in (bfloat16, float16, float32, float64), "
            f"got {dtype_name(dtype) if is_dtype else repr(dtype)}"
        )


def check_at_least(function: str, minimum: int, **sizes: int) -> None:
    """Refuse sizes below a minimum, and what is no int.

    Raises:
        ValueError: one is below it.
        TypeError: one is no int.
    """
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{function}: expected {name} to be an int, got {size!r}")
        if size < minimum:
            raise ValueError(f"{function}: expected {name} >= {minimum}, got {size}")


def check_hidden_size(function: str, hidden_states: Tensor, hidden_size: int) -> None:
    """Refuse hidden states of another size than a layer's.

    Raises:
        ValueError: their last dimension is another one.
    """
    if hidden_states.ndim == 0 or hidden_states.shape[-1] != hidden_size:
        got = hidden_states.shape[-1] if hidden_states.ndim else "a tensor without dimensions"
        raise ValueError(
            f"{function}: expected hidden_states.shape[-1] == hidden_size ({hidden_size}), got {got}"
        )


def check_tensor(function: str, name: str, value: Any, advice: str = "") -> None:
    """Refuse what is no tensor, or a sparse one.

    Raises:
        TypeError: it is none, or sparse.
    """
    if not isinstance(value, Tensor):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{function}: expected {name} to be a tensor, got {got}{advice}")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{function}: expected {name} to be a dense tensor, got layout {value.layout}{advice}"
        )


def is_matrix(value: object) -> bool:
    """Tell whether a value is a tensor of two dimensions."""
    return isinstance(value, Tensor) and value.dim() == 2
