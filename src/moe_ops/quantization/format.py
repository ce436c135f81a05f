# SPDX-License-Identifier: Apache-2.0
"""What a format of quantised weights is.

E num_experts, N out_features, D in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.quantization.codes import Codes
from moe_ops.quantization.scales import SCALES, Scale


class Layout(NamedTuple):
    """Say how to read the stored tensors of a weight. All of it is constant to a compiler."""

    format: str
    shape: tuple[int, ...]
    group_size: int
    scale_encoding: str


@dataclass(frozen=True)
class Format:
    """Store a weight (E, N, D) as codes, and a scale for each block.

        weight[e, n, d] = codes[e, n, d] * scale[e, n // block_rows, d // group_size]

    That product is rounded to fp32, whatever the dtype that it is then rounded to. A block ends with
    its row, its column and its expert, so the last ones may be smaller.

    A kernel reads this declaration too: the codes, the scale's encoding and the block are its
    constants.

    Args:
        name: what users call the format.
        codes: how bytes become numbers.
        scales: the encodings that its scales may have. `encode` gives the first.
        group_sizes: the sizes along in_features that a block may have. The first is the default.
        block_rows: the size of a block along out_features.
        encode: makes the stored tensors of one expert from (its weight (N, D) in fp32,
            group_size).
    """

    name: str
    codes: Codes
    scales: tuple[Scale, ...]
    group_sizes: tuple[int, ...]
    encode: Callable[[Tensor, int], Mapping[str, Tensor]]
    block_rows: int = 1

    def blocks(self, layout: Layout) -> tuple[int, int]:
        """Return how many blocks an expert has: rows and columns of them."""
        _, (_, rows, width), group_size, _ = layout
        return -(-rows // self.block_rows), -(-width // group_size)

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors, by name. Experts come first."""
        _, (num_experts, rows, width), group_size, encoding = layout
        shapes = {
            "codes": (rows, self.codes.row_bytes(width, group_size)),
            **SCALES[encoding].shapes(*self.blocks(layout)),
        }
        return {name: (num_experts, *shape) for name, shape in shapes.items()}

    def decode(self, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """Return one expert's weight (N, D) in fp32, from its stored tensors."""
        _, (_, rows, width), group_size, encoding = layout
        values = in_blocks(self.codes.decode(tensors["codes"]), group_size)
        scales = SCALES[encoding].decode(tensors)
        scales = scales.repeat_interleave(self.block_rows, 0)[:rows]
        return (values * scales[..., None]).flatten(1)[:, :width]


def in_blocks(weight: Tensor, group_size: int) -> Tensor:
    """Return the rows of weight (N, D) in blocks (N, ceil(D / group_size), group_size).

    Zeros fill the last block.
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size))
    return padded.unflatten(1, (-1, group_size))
