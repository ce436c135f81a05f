# SPDX-License-Identifier: Apache-2.0
"""Register ep_combine: it sends the experts' outputs back, and sums each token's over the ranks."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.ep_combine import pytorch

_op = Op("ep_combine")
_op.implement("pytorch", pytorch.ep_combine)
_op.implement("triton", "moe_ops.ops.ep_combine.triton:ep_combine")

_backward_op = Op("ep_combine_backward")
_backward_op.implement("pytorch", pytorch.ep_combine_backward)
_backward_op.implement("triton", "moe_ops.ops.ep_combine.triton:ep_combine_backward")


def _save(ctx: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, sent_slots, *ctx.sizes = args
    ctx.save_for_backward(sent_slots)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor]:
    (sent_slots,) = ctx.saved_tensors
    return (_backward_op.in_backward(grad_output, sent_slots, *ctx.sizes),)


_op.differentiate(_save, _backward)


@documented
def ep_combine(
    input: torch.Tensor,
    local_ids: torch.Tensor,
    sent_slots: torch.Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> torch.Tensor:
    return _op.overload(input, local_ids, sent_slots, num_experts, world_size, capacity, group)
