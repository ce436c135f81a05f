# SPDX-License-Identifier: Apache-2.0
"""Dequantise weights in PyTorch, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.quantization.format import Layout
from moe_ops.quantization.scales import aligned
from moe_ops.quantization.storage import Packed, dequantized
from moe_ops.quantization.stored import StoredWeight


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
    layout = Layout(format, (*codes.shape[:2], in_features), group_size, scale_encoding)
    tensors = {"codes": codes, "scale": scale}
    if nested_scale is not None and nested_offset is not None:
        tensors |= {"nested_scale": nested_scale, "nested_offset": nested_offset}
    tensors = {name: aligned(tensor) for name, tensor in tensors.items()}
    return dequantized(Packed(layout, tensors), output_dtype)


def matrices(weight: Tensor | StoredWeight, dtype: torch.dtype) -> Tensor:
    """Return a weight, dequantised to dtype if it is quantised. Whoever drops it frees it then."""
    return weight if isinstance(weight, Tensor) else dequantize_weight(*weight, dtype)
