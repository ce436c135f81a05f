# SPDX-License-Identifier: Apache-2.0
"""A weight of fused_experts that is made when its product needs it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# What makes a weight (E, out_features, in_features) from its in_features.
Weight = Callable[[int], Tensor]


def made(weight: Tensor | Weight, in_features: int) -> Tensor:
    """Return the weight. Whoever drops it frees it, if it was made here."""
    return weight if isinstance(weight, Tensor) else weight(in_features)
