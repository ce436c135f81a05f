# SPDX-License-Identifier: Apache-2.0
"""How far two computations of a whole module or model may be apart, in relative norms.

Both sides round, after every product and activation on the way: more than one op against fp64 in
testing/tolerances.py, and still far below what one wrong row, weight or bias costs.
"""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; the plain norm of actual where expected is zero."""
    assert actual.shape == expected.shape
    expected = expected.detach().double()
    error, scale = (actual.detach().double() - expected).norm(), expected.norm()
    return float(error / scale) if scale > 0 else float(error)
