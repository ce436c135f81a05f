# SPDX-License-Identifier: Apache-2.0
"""Says how far a result may be from its reference: the one table of tolerances.

The error of a tensor is ||actual - expected|| / ||expected||. Rounding every element to the dtype
once costs at most half its eps (bf16: 3.9e-3). The table leaves room for the few roundings of a
block of ops and for the order of a sum, not for a wrong row, weight or bias, which costs parts of
the whole. Where an op may round but once, a test says so and counts the elements that differ.
"""

import torch
from torch import Tensor

# An op against the reference in fp64, at any size.
RELATIVE_NORM = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
# A module or model against another implementation of it in the same dtype, at tiny sizes: both
# round after each product and activation, but their sums are short.
MODULE_NORM = {
    torch.float32: 2e-6,
    torch.bfloat16: 1.2e-2,
}
# A product of fp32 operands in TF32. In fp32 it is within RELATIVE_NORM.
TF32_NORM = 2e-3
# Two sums in fp64 of the same terms in another order, element by element.
EXACT_SUM = 1e-12
# The share of elements that may differ where an op rounds once: fp32 sums lie beside those in fp64,
# and a few of them on the other side of a rounding.
ROUNDED_OTHERWISE = 0.02
# fp32 keeps the order of two selection keys that differ by this much.
DECIDED_GAP = 1e-5
# A sum in fp32 of some hundred products of numbers of about 1 is less off than this, in any order.
KINK_DISTANCE = 3e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, or ||actual|| where expected is zero.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"expected actual.shape == {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm()
    error = (actual - expected).norm()
    return float(error / scale) if scale > 0 else float(error)
