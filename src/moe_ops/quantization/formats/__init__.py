# SPDX-License-Identifier: Apache-2.0
"""The formats of quantised weights, one in each file, and the table of them."""

from __future__ import annotations

from moe_ops.quantization.format import Format
from moe_ops.quantization.formats import fp8_block, int4, mxfp4, nf4

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (fp8_block, nf4, mxfp4, int4)
}
