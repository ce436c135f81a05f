# SPDX-License-Identifier: Apache-2.0
"""Register routing_indices: it groups the slots of a routing by expert.

Its implementations are shared: fused_experts calls them, too.
"""

from __future__ import annotations

import torch

from moe_ops._core.library import Op, documented
from moe_ops._pytorch import routing

_op = Op("routing_indices")
_op.implement("pytorch", routing.routing_indices)
_op.implement("triton", "moe_ops._triton.routing:routing_indices")


@documented
def routing_indices(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _op.overload(topk_ids, num_experts)
