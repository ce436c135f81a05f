# SPDX-License-Identifier: Apache-2.0
"""Casts indices and counts of any integer dtype to one that the ops take."""

from __future__ import annotations

import torch

_TAKEN_BY_OPS = (torch.int32, torch.int64)
_INTEGER = (
    *_TAKEN_BY_OPS,
    torch.int8,
    torch.int16,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def as_index(values: torch.Tensor, function: str, name: str) -> torch.Tensor:
    """Return `values` as they are if they are int32 or int64, else cast to int64.

    Raises:
        TypeError: the dtype is not an integer dtype. The error names the function and the argument.
    """
    if values.dtype in _TAKEN_BY_OPS:
        return values
    if values.dtype not in _INTEGER:
        expected = f"expected {name} to have an integer dtype"
        raise TypeError(f"moe_ops.compat.{function}: {expected}, got {values.dtype}")
    return values.to(torch.int64)
