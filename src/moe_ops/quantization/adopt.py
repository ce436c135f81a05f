# SPDX-License-Identifier: Apache-2.0
"""Read the quantised weights of other libraries, without a copy where experts are stacked already.

Each function returns the tensors that it gets, seen as bytes. A sequence with a tensor for each
expert is stacked first, which copies the bytes once. A tensor that is not contiguous is copied too.
Values are not checked.

E num_experts, N out_features, D in_features, G D / group_size blocks of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moe_ops._core.checks import check_tensor, dtype_name
from moe_ops.fp8 import BLOCK
from moe_ops.quantization.format import Layout
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.scales import BFLOAT16, E8M0, FLOAT32
from moe_ops.quantization.storage import Packed, layout_of

Tensors = Tensor | Sequence[Tensor]

# Powers of two as torch's dtype, or as its bytes.
_E8M0_DTYPES = (torch.float8_e8m0fnu, torch.uint8)
_REQUANTIZE = "dequantise it and call moe_ops.quantize_weight"


def from_mxfp4(function: str, blocks: Tensors, scales: Tensors) -> Packed:
    """Return (E, N, D) of blocks (E, N, G, 16) or (E, N, D / 2), and scales (E, N, G)."""
    blocks, scales = stacked(function, "blocks", blocks), stacked(function, "scales", scales)
    check_dtype(function, "blocks", blocks, torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
    check_dtype(function, "scales", scales, *_E8M0_DTYPES)
    if not (blocks.dim() == 3 or (blocks.dim() == 4 and blocks.shape[3] == 16)):
        raise ValueError(
            f"{function}: expected blocks.shape to be (num_experts, out_features, "
            f"in_features / 32, 16) or (num_experts, out_features, in_features / 2), "
            f"got {tuple(blocks.shape)}"
        )
    if blocks.dim() == 3 and blocks.shape[2] % 16:
        raise ValueError(
            f"{function}: expected blocks.shape[2] to be a multiple of 16, since 16 bytes are a "
            f"block of 32 weights, got {blocks.shape[2]}; {_REQUANTIZE}"
        )
    codes = as_bytes(blocks).flatten(2)
    layout = layout_of(function, "mxfp4", (*codes.shape[:2], 2 * codes.shape[2]))
    check_beside(function, "scales", scales, scale_shape(layout), codes.device)
    return Packed(layout, {"codes": codes, "scale": as_bytes(scales)})


def from_fp8_block(function: str, weight: Tensors, weight_scale_inv: Tensors) -> Packed:
    """Return (E, N, D) of weight (E, N, D) and scales (E, ceil(N / 128), ceil(D / 128))."""
    weight = stacked(function, "weight", weight)
    scale = stacked(function, "weight_scale_inv", weight_scale_inv)
    check_dtype(function, "weight", weight, torch.float8_e4m3fn)
    check_dtype(function, "weight_scale_inv", scale, torch.float32, *_E8M0_DTYPES)
    if weight.dim() != 3:
        raise ValueError(
            f"{function}: expected weight.shape to be (num_experts, out_features, in_features), "
            f"got {tuple(weight.shape)}"
        )
    encoding = FLOAT32 if scale.dtype == torch.float32 else E8M0
    layout = layout_of(function, "fp8_block", tuple(weight.shape), BLOCK, encoding.name)
    check_beside(function, "weight_scale_inv", scale, scale_shape(layout), weight.device)
    return Packed(layout, {"codes": as_bytes(weight), "scale": as_bytes(scale)})


def from_compressed_int4(
    function: str,
    weight_packed: Tensors,
    weight_scale: Tensors,
    shape: Sequence[int] | Tensor,
    group_size: int,
) -> Packed:
    """Return (E, N, D) of words (E, N, D / 8) and scales (E, N, G)."""
    words = stacked(function, "weight_packed", weight_packed)
    scale = stacked(function, "weight_scale", weight_scale)
    check_dtype(function, "weight_packed", words, torch.int32)
    check_dtype(function, "weight_scale", scale, torch.bfloat16, torch.float16, torch.float32)
    if words.dim() != 3:
        raise ValueError(
            f"{function}: expected weight_packed.shape to be (num_experts, out_features, "
            f"in_features / 8), got {tuple(words.shape)}"
        )
    sizes = _integers(function, shape)
    if len(sizes) == 2:
        # compressed-tensors' weight_shape is that of one expert.
        sizes = (words.shape[0], *sizes)
    if scale.dtype == torch.float16:
        scale = scale.float()
    encoding = BFLOAT16 if scale.dtype == torch.bfloat16 else FLOAT32
    if group_size is None:
        # layout_of would take int4's default.
        raise ValueError(f"{function}: expected group_size of int4 to be 32 or 128, got None")
    layout = layout_of(function, "int4", sizes, group_size, encoding.name)
    if sizes[2] % layout.group_size:
        raise ValueError(
            f"{function}: expected shape[-1] to be a multiple of group_size ({layout.group_size}), "
            f"got {sizes[2]}; {_REQUANTIZE}"
        )
    check_beside(function, "weight_packed", words, (*sizes[:2], sizes[2] // 8), words.device)
    check_beside(function, "weight_scale", scale, scale_shape(layout), words.device)
    return Packed(layout, {"codes": as_bytes(words), "scale": as_bytes(scale)})


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor (..., n), (..., n * itemsize); no copy if it is contiguous."""
    if not tensor.is_contiguous() or tensor.stride(-1) != 1:
        # The stride of a size of one may be any. Then there is no view as bytes.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8)


def scale_shape(layout: Layout) -> tuple[int, ...]:
    """Return the shape of a weight's scales, one for each block: (E, rows of blocks, G)."""
    return (layout.shape[0], *FORMATS[layout.format].blocks(layout))


def stacked(function: str, name: str, tensors: Tensors) -> Tensor:
    """Return the tensor (E, ...), or the tensors of E experts stacked.

    Raises:
        TypeError: they are no tensors, or come from an iterator, which can be read only once.
        ValueError: there are none, or their shapes or dtypes differ.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        check_tensor(function, name, tensors)
        return tensors.detach()
    if isinstance(tensors, Iterator):
        raise TypeError(
            f"{function}: expected {name} to be a tensor or a sequence of tensors, an expert each, "
            f"got {type(tensors).__name__}; pass a list"
        )
    for expert, tensor in enumerate(tensors):
        check_tensor(function, f"{name}[{expert}]", tensor)
    kinds = {(tuple(tensor.shape), dtype_name(tensor.dtype)) for tensor in tensors}
    if len(kinds) != 1:
        raise ValueError(
            f"{function}: expected {name} to have tensors of one shape and dtype, an expert each, "
            f"got {sorted(kinds) or 'none'}"
        )
    return torch.stack([tensor.detach() for tensor in tensors])


def _integers(function: str, shape: Iterable[int] | Tensor) -> tuple[int, ...]:
    """Return a shape, which may be a tensor, as integers.

    Raises:
        TypeError: it is no shape.
    """
    try:
        return tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(
            f"{function}: expected shape to be (out_features, in_features), or that after "
            f"num_experts, got {shape!r}"
        ) from None


def check_dtype(function: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another dtype.

    Raises:
        TypeError: its dtype is none of dtypes.
    """
    if tensor.dtype not in dtypes:
        names = ", ".join(map(dtype_name, dtypes))
        expected = f"in ({names})" if len(dtypes) > 1 else f"== {names}"
        raise TypeError(
            f"{function}: expected {name}.dtype {expected}, got {dtype_name(tensor.dtype)}"
        )


def check_beside(
    function: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse a tensor of another shape, or on another device than the codes.

    Raises:
        ValueError: its shape or its device is another.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{function}: expected {name}.shape == {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(
            f"{function}: expected {name}.device == {device}, as its codes, got {tensor.device}"
        )
