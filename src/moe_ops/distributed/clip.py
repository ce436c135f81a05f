# SPDX-License-Identifier: Apache-2.0
"""Clip gradients of which some are sharded over one mesh, some over another, and some are plain."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients together, as torch.nn.utils.clip_grad_norm_ does.

        total_norm = (sum over all elements of all gradients of abs(grad)^norm_type)^(1 / norm_type)
        grad       = grad * min(1, max_norm / (total_norm + 1e-6))

    Gradients that are DTensors, on whatever mesh, count with all their shards. Plain ones count once:
    every rank must hold the same, so reduce them over the ranks first. Each rank calls it.

    Args:
        parameters (Tensor or iterable of Tensor): their gradients are clipped in place.
        max_norm (float): the largest norm that is left.
        norm_type (float): of the norm; math.inf is the largest element.
        error_if_nonfinite (bool): raise where the norm is infinite or NaN. It synchronises.
        foreach (bool or None): as torch's.

    Returns:
        total_norm (scalar Tensor): before clipping, the same on every rank.

    Raises:
        RuntimeError: the norm is not finite, with error_if_nonfinite.

    Deterministic.
    """
    norm_type = float(norm_type)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    # torch's own functions take DTensors of one mesh.
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = [
        _whole(get_total_norm([_grad(p) for p in part], norm_type, False, foreach))
        for part in by_mesh.values()
    ]
    if not norms:
        return torch.tensor(0.0)
    parts = torch.stack([norm.to(norms[0].device) for norm in norms])
    # The norm of type 0 counts gradients, so the parts of a sum are not counted again.
    total = parts.sum() if norm_type == 0 else torch.linalg.vector_norm(parts, norm_type)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"moe_ops.distributed.clip_grad_norm_: expected a finite total norm, got {total.item()}; "
            "pass error_if_nonfinite=False to scale by it anyway"
        )
    for part in by_mesh.values():
        clip_grads_with_norm_(part, max_norm, total, foreach)
    return total


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
