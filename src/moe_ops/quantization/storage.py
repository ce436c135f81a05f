# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as plain tensors, and how to make and read them.

E num_experts, N out_features, D in_features.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops.quantization.format import Layout
from moe_ops.quantization.formats import FORMATS


class Packed(NamedTuple):
    """Hold a quantised weight: its layout and its stored tensors by name."""

    layout: Layout
    tensors: Mapping[str, Tensor]


def layout_of(
    function: str,
    format: str,
    shape: Sequence[int],
    group_size: int | None = None,
    scale_encoding: str | None = None,
) -> Layout:
    """Return the layout of a weight that `function` makes. None chooses the format's default.

    Raises:
        TypeError: a shape that is no sequence of integers.
        ValueError: an unknown format; a group_size or a scale_encoding that the format does not have; a
            shape that is not (E, N, D).
    """
    # The tuple takes what has no hash too.
    if format not in tuple(FORMATS):
        raise ValueError(
            f"{function}: expected format to be one of {', '.join(FORMATS)}, got {format!r}"
        )
    declared = FORMATS[format]
    encodings = [scale.name for scale in declared.scales]
    for name, value, allowed in (
        ("group_size", group_size, declared.group_sizes),
        ("scale_encoding", scale_encoding, encodings),
    ):
        if value is not None and (isinstance(value, float) or value not in allowed):
            choice = " or ".join(map(str, allowed))
            raise ValueError(
                f"{function}: expected {name} of {format} to be {choice}, got {value!r}"
            )
    is_sizes = are_integers(shape)
    if not is_sizes or len(shape) != 3 or min(shape) < 0:
        raise (ValueError if is_sizes else TypeError)(
            f"{function}: expected shape to be (num_experts, out_features, in_features), "
            f"got {tuple(shape) if is_sizes else repr(shape)}"
        )
    return Layout(
        format,
        tuple(shape),
        int(group_size or declared.group_sizes[0]),
        scale_encoding or encodings[0],
    )


def are_integers(shape: Any) -> bool:
    """Tell whether a shape is a sequence of integers."""
    integers = (numbers.Integral, torch.SymInt)
    return isinstance(shape, Sequence) and all(isinstance(size, integers) for size in shape)


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a weight's stored tensors, by name."""
    return FORMATS[layout.format].shapes(layout)


def empty(layout: Layout, device: torch.device | str | None = None) -> Packed:
    """Return a weight whose stored tensors are not initialised."""
    return Packed(
        layout,
        {
            name: torch.empty(shape, dtype=torch.uint8, device=device)
            for name, shape in shapes(layout).items()
        },
    )


def quantized(weight: Tensor, layout: Layout) -> Packed:
    """Return weight (E, N, D) in the layout. It quantises one expert at a time."""
    packed = empty(layout, weight.device)
    if weight.is_meta:
        return packed
    if not weight.numel():
        for tensor in packed.tensors.values():
            tensor.zero_()
        return packed
    encode = FORMATS[layout.format].encode
    for expert, matrix in enumerate(weight.detach()):
        for name, tensor in encode(_float(matrix), layout.group_size).items():
            packed.tensors[name][expert].copy_(tensor)
    return packed


def _float(matrix: Tensor) -> Tensor:
    """Return a matrix in fp32 and row after row: weights may come transposed."""
    return matrix.float().contiguous()


def dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight (E, N, D) in dtype. It dequantises one expert at a time."""
    layout, tensors = packed
    output = torch.empty(layout.shape, dtype=dtype, device=tensors["codes"].device)
    if not output.numel():
        return output
    decode = FORMATS[layout.format].decode
    for expert, matrix in enumerate(output):
        mine = {name: tensor[expert] for name, tensor in tensors.items()}
        matrix.copy_(decode(mine, layout))
    return output
