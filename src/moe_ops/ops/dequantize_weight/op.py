# SPDX-License-Identifier: Apache-2.0
"""Register dequantize_weight: it makes the experts' weights from codes and scales.

A compiler does not look into it: Inductor's kernel of the traced decoder of nf4 gave wrong values on
a CPU.
"""

from moe_ops._core.library import Op
from moe_ops._pytorch.dequantize import dequantize_weight

_op = Op("dequantize_weight")
_op.implement("pytorch", dequantize_weight)
_op.implement("triton", "moe_ops._triton.dequantize:dequantize_weight")
