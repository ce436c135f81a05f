# SPDX-License-Identifier: Apache-2.0
"""The codes of quantised weights: how bytes become numbers.

A decoder reads a declaration here, in PyTorch (`decode`) as in Triton: a kernel takes the bits, the
table and the order of the halves as constants. So a new code book needs no new kernel.

N out_features, D in_features, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class E4M3:
    """A byte is a float8_e4m3fn. Rows are not padded."""

    bits = 8

    def row_bytes(self, width: int, group_size: int) -> int:
        """Return the bytes of a row of `width` codes."""
        return width

    def decode(self, codes: Tensor) -> Tensor:
        """Return the fp32 values of codes (N, B), (N, B)."""
        return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Nibbles:
    """A byte is two codes of four bits, and a table has their values.

    A row is a whole number of blocks. Behind its last element stand codes of zero.
    """

    table: tuple[float, ...]
    # Which half of a byte is the element that comes first.
    low_first: bool

    bits = 4

    def row_bytes(self, width: int, group_size: int) -> int:
        """Return the bytes of a row of `width` codes."""
        return -(-width // group_size) * group_size // 2

    def pack(self, codes: Tensor) -> Tensor:
        """Return the bytes (..., B) of integer codes (..., 2 * B)."""
        first, second = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        low, high = (first, second) if self.low_first else (second, first)
        return low | high << 4

    def decode(self, codes: Tensor) -> Tensor:
        """Return the fp32 values of codes (N, B), (N, 2 * B)."""
        low, high = codes & 15, codes >> 4
        pair = (low, high) if self.low_first else (high, low)
        table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        return table[torch.stack(pair, -1).flatten(-2).int()]


Codes = E4M3 | Nibbles


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Return the index of the entry nearest to each value. Of two, it takes the lower one.

    `table` ascends. A NaN gets the last entry.
    """
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2)
