# SPDX-License-Identifier: Apache-2.0
"""Make quantised weights.

E num_experts, N out_features, D in_features.
"""

from __future__ import annotations

from torch import Tensor

from moe_ops._core.checks import check_tensor, check_weight_dtype
from moe_ops._core.sharded import refuse_sharded
from moe_ops.quantization import storage
from moe_ops.quantization.weight import QuantizedWeight


def quantize_weight(
    weight: Tensor,
    format: str,
    group_size: int | None = None,
) -> QuantizedWeight:
    """Quantise the weights of experts in fp32, in blocks along in_features.

        weight[e, n, d] ~ codes[e, n, d] * scale[e, n, d // group_size]

    | format      | codes          | scale of a block           | block     | bits a weight |
    | ----------- | -------------- | -------------------------- | --------- | ------------- |
    | `fp8_block` | float8_e4m3fn  | max / 448 in fp32          | 128 x 128 | 8.002         |
    | `nf4`       | NormalFloat4   | max in 8 bits, nested      | 64        | 4.127         |
    | `mxfp4`     | e2m1           | a power of two, 8 bits     | 32        | 4.25          |
    | `int4`      | -8 .. 7        | max / 7.5 in bf16          | 32 or 128 | 4.5 or 4.125  |

    max is the largest |weight| of the block, and codes are the nearest to weight / scale. mxfp4 takes
    the least power of two with max <= 7 * scale; the specification also takes one with max between 7
    and 8 times it, and cuts off.

    A block ends with its row, so the last one of a row may be smaller, and no two experts share one.
    fp8_block's also spans 128 out_features. A row of four-bit codes fills its last block with zeros.

    A NaN or an infinity makes its block NaN; with nf4, its expert. A block of zeros stays zero. Scales
    are at least 2**-126 (fp8_block, int4) or 2**-127 (mxfp4), so subnormal weights may become zero.

    nf4 stores scales as distances from their mean, to 0.7% of the largest distance among 256
    neighbours. In an expert whose other rows are alike, the scales of a row ten times smaller are off
    by about 6%, of one a hundred times smaller by about 70%, and a still smaller one may come back
    larger or with its sign flipped, as with bitsandbytes. If the sum of an expert's scales is beyond
    the largest fp32 number, the expert becomes NaN.

    Args:
        weight (Tensor (E, N, D), floating): the experts' weights, in any strides.
        format (str): one of the table's.
        group_size (int or None): the size of int4's blocks; None takes 32. The other formats have one
            size each.

    Returns:
        quantised (QuantizedWeight (E, N, D)): on the weight's device; its dtype is weight's.

    Raises:
        TypeError: weight is no tensor, a DTensor, sparse, not floating, or has 8 bits or fewer.
        ValueError: weight has not three dimensions; an unknown format; a group_size that the
            format does not have.

    Not differentiable. Deterministic bit for bit. It takes one expert at a time, and temporaries a few
    times as large as that in fp32. A weight on the meta device makes a quantised one there.

    Source: each format's file in moe_ops/quantization/formats names its own.
    """
    function = "moe_ops.quantize_weight"
    is_quantized = isinstance(weight, QuantizedWeight)
    advice = "; pass its .dequantize() to quantise it anew" if is_quantized else ""
    check_tensor(function, "weight", weight, advice)
    refuse_sharded(function, "weight", weight, "quantise it")
    check_weight_dtype(function, weight.dtype, "weight.dtype")
    if weight.dim() != 3:
        raise ValueError(
            f"{function}: expected weight.dim() == 3, got {weight.dim()} {tuple(weight.shape)}"
        )
    layout = storage.layout_of(function, format, tuple(weight.shape), group_size)
    return QuantizedWeight(storage.quantized(weight, layout), weight.dtype)
