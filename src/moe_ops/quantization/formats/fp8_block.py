# SPDX-License-Identifier: Apache-2.0
"""float8_e4m3fn with a scale for each block of 128 x 128.

Source: the format of the checkpoints of DeepSeek-V3 (arXiv:2412.19437) and Qwen3-FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.fp8 import BLOCK, quantize_fp8
from moe_ops.quantization.codes import E4M3
from moe_ops.quantization.format import Format
from moe_ops.quantization.scales import E8M0, FLOAT32


def encode(weight: Tensor, group_size: int) -> dict[str, Tensor]:  # noqa: ARG001 - Format.encode's
    """Quantise one expert as moe_ops.quantize_fp8 does."""
    codes, scale = quantize_fp8(weight)
    return {"codes": codes.view(torch.uint8), **FLOAT32.encode(scale)}


FORMAT = Format(
    name="fp8_block",
    codes=E4M3(),
    scales=(FLOAT32, E8M0),
    group_sizes=(BLOCK,),
    encode=encode,
    block_rows=BLOCK,
)
