# SPDX-License-Identifier: Apache-2.0
"""Register the op dequantize_weight, which moe_ops.QuantizedWeight.dequantize calls."""

from moe_ops.ops.dequantize_weight import op as op
