# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the fp64 reference: one table, relative norms.

The error of a tensor is ||actual - expected|| / ||expected||. One rounding to the dtype costs
about eps/3 of that norm; the factors leave room for the accumulation order, not for a wrong row,
weight or bias, which costs parts of the whole.
"""

import torch
from torch import Tensor

RELATIVE_NORM = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; the plain norm of actual where expected is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm()
    error = (actual - expected).norm()
    return float(error / scale) if scale > 0 else float(error)
