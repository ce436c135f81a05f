# SPDX-License-Identifier: Apache-2.0
"""Integers from -8 to 7 with a scale for each 32 or 128: symmetric, without a zero point.

Source: compressed-tensors' "pack-quantized" format with four bits, as in Kimi-K2-Thinking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.quantization.codes import Nibbles
from moe_ops.quantization.format import Format, in_blocks
from moe_ops.quantization.scales import BFLOAT16, FLOAT32

CODES = Nibbles(tuple(float(code - 8) for code in range(16)), low_first=True)


def encode(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Quantise one expert: scale = max |weight| / 7.5 in bf16, codes = weight / scale, rounded.

    Ties go to the even code. The error of a weight is at most 0.53 of its scale. The least scale is
    2**-126. A block of zeros gets 1. A NaN or an infinity makes its block NaN.
    """
    rows = in_blocks(weight, group_size)
    largest = rows.abs().amax(2)
    scale = (largest / 7.5).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.where(largest > 0, 1.0).where(largest.isfinite(), torch.nan)
    stored = BFLOAT16.encode(scale)
    codes = (rows / BFLOAT16.decode(stored)[..., None]).nan_to_num().round().clamp(-8, 7) + 8
    return {"codes": CODES.pack(codes.flatten(1)), **stored}


FORMAT = Format(
    name="int4",
    codes=CODES,
    scales=(BFLOAT16, FLOAT32),
    group_sizes=(32, 128),
    encode=encode,
)
