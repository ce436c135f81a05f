# SPDX-License-Identifier: Apache-2.0
"""Tensor descriptors: what the tensor memory accelerator (TMA) of Hopper and newer loads and stores."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor


def can_describe(tensor: torch.Tensor, inner: int = -1) -> bool:
    """Return whether TMA can describe the tensor: elements, a 16-byte address, 16-byte strides.

    Args:
        tensor: the operand.
        inner: the dimension whose elements are neighbours.
    """
    strides, itemsize = list(tensor.stride()), tensor.itemsize
    if strides.pop(inner) != 1 or tensor.data_ptr() % 16 != 0:
        return False
    for stride in strides:
        if stride <= 0 or stride * itemsize % 16 != 0:
            return False
    return tensor.numel() > 0


def can_describe_rows(width: int, dtype: torch.dtype) -> bool:
    """Return whether TMA can describe a new matrix with rows of this width."""
    return width > 0 and width * dtype.itemsize % 16 == 0


def describe(
    tensor: torch.Tensor, block: tuple[int, ...], ragged: bool = False
) -> TensorDescriptor:
    """Return a descriptor of the tensor in such blocks; can_describe(tensor) must hold.

    A ragged one begins and ends at the rows that the kernel says (triton.tools.ragged_tma).
    """
    # Its constructor would check again, at the cost of a launch, what does not change.
    descriptor = object.__new__(TensorDescriptor)
    fields = _descriptor_fields(tensor.shape, tensor.stride(), tensor.dtype, block, ragged)
    descriptor.__dict__.update(fields, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=4096)
def _descriptor_fields(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    block: tuple[int, ...],
    ragged: bool,
) -> dict[str, Any]:
    """Return what a TensorDescriptor has beside its tensor."""
    alike = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    make = create_ragged_descriptor if ragged else TensorDescriptor.from_tensor
    return dict(vars(make(alike, list(block))))


def describe_for_gluon(tensor: torch.Tensor, block: tuple[int, ...], ragged: bool = False) -> Any:
    """Return the same for kernels in Gluon, whose descriptors say how a block lies in shared memory."""
    plain = describe(tensor, block, ragged)
    make, layout = _gluon_layout(tuple(plain.block_shape), tensor.dtype)
    descriptor: Any = object.__new__(make)
    descriptor.__dict__.update(vars(plain), layout=layout)
    return descriptor


@functools.lru_cache(maxsize=4096)
def _gluon_layout(block: tuple[int, ...], dtype: torch.dtype) -> tuple[type, Any]:
    """Return Gluon's class of descriptors, and the layout that it gives such a block."""
    # Experimental: not to be imported where no kernel needs it.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return Described, gl.NVMMASharedLayout.get_default_for(list(block), element)
