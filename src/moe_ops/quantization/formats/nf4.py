# SPDX-License-Identifier: Apache-2.0
"""NormalFloat of four bits: 16 quantiles of a normal distribution, times a block's absmax.

Source: QLoRA (arXiv:2305.14314); the numbers, the packing and the double quantisation are those of
bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.quantization.codes import Nibbles, nearest
from moe_ops.quantization.format import Format, in_blocks
from moe_ops.quantization.scales import FLOAT32, NESTED

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
CODES = Nibbles(NF4, low_first=False)


def encode(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Quantise one expert: absmax of each block, and the code nearest to weight / absmax.

    A NaN or an infinity makes the expert NaN. A block of zeros keeps its zeros.
    """
    rows = in_blocks(weight, group_size)
    absmax = rows.abs().amax(2)
    scaled = rows / absmax.where(absmax > 0, 1.0)[..., None]
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    return {"codes": CODES.pack(nearest(scaled, table).flatten(1)), **NESTED.encode(absmax)}


FORMAT = Format(
    name="nf4",
    codes=CODES,
    scales=(NESTED, FLOAT32),
    group_sizes=(64,),
    encode=encode,
)
