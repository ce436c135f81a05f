# SPDX-License-Identifier: Apache-2.0
"""Describe tensors for TMA, the tensor memory accelerator of Hopper and newer GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor


def can_describe(tensor: torch.Tensor, inner: int = -1) -> bool:
    """Return whether TMA can describe the tensor.

    It must have elements. Its address and its strides must be multiples of 16 bytes, but for the
    stride of `inner`, which must be 1. The stride of a dimension of size 1 does not matter.

    Args:
        tensor: the operand.
        inner: the dimension whose elements are neighbours.
    """
    shape, strides, itemsize = list(tensor.shape), list(tensor.stride()), tensor.itemsize
    if strides.pop(inner) != 1 or tensor.data_ptr() % 16 != 0:
        return False
    shape.pop(inner)
    for size, stride in zip(shape, strides, strict=True):
        if size != 1 and (stride <= 0 or stride * itemsize % 16 != 0):
            return False
    return tensor.numel() > 0


def can_describe_rows(width: int, dtype: torch.dtype) -> bool:
    """Return whether TMA can describe a new matrix with rows of this width."""
    return width > 0 and width * dtype.itemsize % 16 == 0


def describe(
    tensor: torch.Tensor, block: tuple[int, ...], ragged: bool = False
) -> TensorDescriptor:
    """Return a descriptor of the tensor in such blocks; can_describe(tensor) must hold.

    The kernel says at which rows a ragged one begins and ends (triton.tools.ragged_tma).
    """
    # The constructor would repeat its checks at every launch, and takes as long as a launch.
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
    """Return the fields of a TensorDescriptor, without its tensor."""
    strides, of_16_bytes = list(stride), 16 // dtype.itemsize
    for i in reversed(range(len(shape) - 1)):
        if shape[i] == 1:
            # Views give it any stride, and TMA's rule holds for it, too.
            strides[i] = -(-shape[i + 1] * strides[i + 1] // of_16_bytes) * of_16_bytes
    alike = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    make = create_ragged_descriptor if ragged else TensorDescriptor.from_tensor
    return dict(vars(make(alike, list(block))))


def describe_for_gluon(tensor: torch.Tensor, block: tuple[int, ...], ragged: bool = False) -> Any:
    """Return the same for a kernel in Gluon: it also says how a block lies in shared memory."""
    plain = describe(tensor, block, ragged)
    make, layout = _gluon_layout(tuple(plain.block_shape), tensor.dtype)
    descriptor: Any = object.__new__(make)
    descriptor.__dict__.update(vars(plain), layout=layout)
    return descriptor


@functools.lru_cache(maxsize=4096)
def _gluon_layout(block: tuple[int, ...], dtype: torch.dtype) -> tuple[type, Any]:
    """Return Gluon's class of descriptors, and its layout for such a block in shared memory."""
    # Gluon is experimental: import it only where a kernel needs it.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return Described, gl.NVMMASharedLayout.get_default_for(list(block), element)
