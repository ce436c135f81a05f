# SPDX-License-Identifier: Apache-2.0
"""A quantised weight as ops get it: its stored tensors, and what says how to read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StoredWeight(NamedTuple):
    """Hold a weight (E, N, D). The fields are the arguments of moe::dequantize_weight, in order.

    Attributes:
        codes, scale, nested_scale, nested_offset: the stored tensors, experts first.
        format, group_size, scale_encoding: how to read them.
        in_features: D, which padded rows of codes do not show.
    """

    codes: Tensor
    scale: Tensor
    nested_scale: Tensor | None
    nested_offset: Tensor | None
    format: str
    group_size: int
    scale_encoding: str
    in_features: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (E, N, D)."""
        num_experts, out_features, _ = self.codes.shape
        return num_experts, out_features, self.in_features


TENSOR_NAMES = StoredWeight._fields[:4]
# The length of QuantizedWeight.stored, which an op takes as arguments: all fields but in_features.
NUM_STORED = len(StoredWeight._fields) - 1
