# SPDX-License-Identifier: Apache-2.0
"""Register routing_indices: it groups the slots of a routing by expert."""

from __future__ import annotations

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.routing_indices import pytorch

_op = Op("routing_indices")
_op.implement("pytorch", pytorch.routing_indices)
_op.implement("triton", "moe_ops.ops.routing_indices.triton:routing_indices")


@documented
def routing_indices(
    topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _op.overload(topk_ids, num_experts)
