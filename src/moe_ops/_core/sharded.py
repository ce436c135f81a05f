# SPDX-License-Identifier: Apache-2.0
"""Tell weights and experts that are spread over ranks.

torch.distributed.tensor is not imported: that takes a second.
"""

from __future__ import annotations

from torch import Tensor

# What moe_ops.distributed.ExpertParallel keeps on a module.
PARALLEL = "_expert_parallel"


def is_sharded(value: object) -> bool:
    """Tell whether a value is a DTensor."""
    return isinstance(value, Tensor) and type(value).__name__ == "DTensor"
