# SPDX-License-Identifier: Apache-2.0
"""Differentiates the oracle's functions, by torch's autograd in fp64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_fp64(*tensors: Tensor | None) -> Any:
    """Return each tensor in fp64, and None for None: a list, or the one tensor that was given."""
    converted = [None if tensor is None else tensor.to(torch.float64) for tensor in tensors]
    return converted[0] if len(converted) == 1 else converted


def gradients(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    differentiable: list[str],
    grad_output: Tensor,
) -> dict[str, Tensor]:
    """Return the gradient of each argument named in `differentiable`, in fp64.

    `function` is one of the oracle's or of the reference's. If it has several outputs, the first is
    differentiated. An argument that the output does not depend on has a zero gradient.
    """
    leaves = {
        name: arguments[name].detach().to(torch.float64).clone().requires_grad_()
        for name in differentiable
        if arguments.get(name) is not None
    }
    output = function(**{**arguments, **leaves})
    output = output[0] if isinstance(output, tuple) else output
    if not output.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        output,
        list(leaves.values()),
        grad_output.to(torch.float64),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


def needed_gradients(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    names: list[str],
    grad_output: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `names`, with None for those that `needs` does not ask for."""
    found = gradients(function, arguments, names, grad_output)
    return tuple(found.get(name) if need else None for name, need in zip(names, needs, strict=True))
