# SPDX-License-Identifier: Apache-2.0
"""Register ep_dispatch: it sends each token once to every rank that holds one of its experts."""

from __future__ import annotations

from typing import Any

import torch

from moe_ops._core.library import Op, documented
from moe_ops.ops.ep_dispatch import pytorch

_op = Op("ep_dispatch")
_op.implement("pytorch", pytorch.ep_dispatch)
_op.implement("triton", "moe_ops.ops.ep_dispatch.triton:ep_dispatch")

_backward_op = Op("ep_dispatch_backward")
_backward_op.implement("pytorch", pytorch.ep_dispatch_backward)
_backward_op.implement("triton", "moe_ops.ops.ep_dispatch.triton:ep_dispatch_backward")


def _save(ctx: Any, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    rows, local_ids, weights, sent_slots, _ = outputs
    ctx.save_for_backward(local_ids, sent_slots)
    ctx.sizes = args[3:]
    # Sizes and dtypes alone: of what was received, the ids are kept and the rows are not.
    ctx.rows, ctx.weights = (
        (t.shape, {"dtype": t.dtype, "device": t.device}) for t in (rows, weights)
    )


def _backward(
    ctx: Any,
    grad_rows: torch.Tensor | None,
    _ids: None,
    grad_weights: torch.Tensor | None,
    _slots: None,
    _dropped: None,
) -> tuple[torch.Tensor | None, ...]:
    local_ids, sent_slots = ctx.saved_tensors
    if grad_rows is None:
        shape, kind = ctx.rows
        grad_rows = torch.zeros(shape, **kind)
    if grad_weights is None:
        shape, kind = ctx.weights
        grad_weights = torch.zeros(shape, **kind)
    needs = [ctx.needs[0], ctx.needs[2]]
    grad_input, grad_topk_weights = _backward_op.in_backward(
        grad_rows, grad_weights, local_ids, sent_slots, *ctx.sizes, needs
    )
    return grad_input, None, grad_topk_weights


_op.differentiate(_save, _backward)


@documented
def ep_dispatch(
    input: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    world_size: int,
    capacity: int,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _op.overload(input, topk_ids, topk_weights, num_experts, world_size, capacity, group)
