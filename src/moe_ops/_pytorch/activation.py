# SPDX-License-Identifier: Apache-2.0
"""The activations between an expert's two projections, and their gradients.

R rows, I intermediate_size, U = 2 * I where gated, else I.

All is computed in fp32 (fp64 for fp64), and each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Function:
    """One activation: `value` is act(gate), `gradient` is grad * act'(gate).

    Where gated, up + up_offset multiplies act(gate).
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    up_offset: float = 0.0


_FUNCTIONS = {
    "silu": _Function(F.silu, _aten.silu_backward),
    "gelu": _Function(F.gelu, _aten.gelu_backward),
    "gelu_tanh": _Function(
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: _aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "relu": _Function(F.relu, lambda grad, gate: _aten.threshold_backward(grad, gate, 0)),
    "relu_squared": _Function(
        lambda gate: F.relu(gate).square(), lambda grad, gate: 2 * F.relu(gate) * grad
    ),
    # gate * sigmoid(1.702 * gate) is silu(1.702 * gate) / 1.702.
    "swiglu_oai": _Function(
        lambda gate: F.silu(1.702 * gate) / 1.702,
        lambda grad, gate: _aten.silu_backward(grad, 1.702 * gate),
        up_offset=1.0,
    ),
}

# The names that moe::fused_experts takes.
ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)
# Those that are a function of the gate alone.
GATE_ACTIVATIONS: tuple[str, ...] = tuple(
    name for name, function in _FUNCTIONS.items() if not function.up_offset
)


def gate_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return act, a function of the gate alone, computed in the gate's dtype.

    Raises:
        ValueError: a name that is not in GATE_ACTIVATIONS.
    """
    if name not in GATE_ACTIVATIONS:
        raise ValueError(f"expected an activation in {GATE_ACTIVATIONS}, got {name!r}")
    return _FUNCTIONS[name].value


@dataclass(frozen=True)
class Activation:
    """Map the pre-activation z (R, U) to h (R, I).

        gate, up = z[:, :I], z[:, I:], or z[:, 0::2], z[:, 1::2] where interleaved
        h        = act(min(gate, limit)) * clamp(up, -limit, limit)
        h        = act(min(z, limit)) where not gated

    swiglu_oai multiplies by the clamped up + 1. A gate or an up that stands exactly at its limit
    has its gradient; beyond the limit the gradient is zero.
    """

    name: str
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None

    def apply(self, z: Tensor) -> Tensor:
        """Return h (R, I), in z's dtype. Differentiable."""
        gate, up = self._limited(*self._split(_widened(z)))
        h = _FUNCTIONS[self.name].value(gate)
        return (h if up is None else h * up).to(z.dtype)

    def backward(
        self,
        z: Tensor,
        grad_h: Tensor | None,
        scale: Tensor | None = None,
        *,
        h: Tensor | None = None,
        grad_z: Tensor | None = None,
        dots: Tensor | None = None,
    ) -> None:
        """Write the gradient of scale * apply(z), and what else its users need, where it is given.

            h       = scale * apply(z)
            grad_z  = scale * grad_h * the derivative of apply at z
            dots[i] = <grad_h[i], apply(z)[i]>

        Args:
            z (R, U): the pre-activation.
            grad_h (R, I): the gradient of scale * apply(z); None where only h is asked for.
            scale (R, 1): a factor of each row; None is 1.
            h (R, I): written where given, in any strides and dtype.
            grad_z (R, U): likewise.
            dots (R,): likewise.
        """
        function = _FUNCTIONS[self.name]
        z_gate, z_up = self._split(_widened(z))
        gate, up = self._limited(z_gate, z_up)
        act = function.value(gate)
        result = act if up is None else act * up
        scale = None if scale is None else scale.to(result.dtype)
        if h is not None:
            h.copy_(result if scale is None else result * scale)
        if grad_h is None:
            return
        grad = _widened(grad_h)
        if dots is not None:
            dots.copy_(torch.linalg.vecdot(grad, result))
        if grad_z is None:
            return
        grad = grad if scale is None else grad * scale
        grad_gate = function.gradient(grad if up is None else grad * up, gate)
        grad_up = None if up is None else grad * act
        if self.limit is not None:
            grad_gate = grad_gate.masked_fill_(z_gate > self.limit, 0.0)
            if z_up is not None and grad_up is not None:
                grad_up.masked_fill_(z_up.abs() > self.limit, 0.0)
        into_gate, into_up = self._halves(grad_z)
        into_gate.copy_(grad_gate)
        if into_up is not None and grad_up is not None:
            into_up.copy_(grad_up)

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return views of gate and up; up is None where there is none."""
        if not self.gated:
            return z, None
        if self.interleaved:
            return z[:, 0::2], z[:, 1::2]
        half = z.shape[1] // 2
        return z[:, :half], z[:, half:]

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return gate and up to compute with: contiguous where interleaved, which is faster."""
        gate, up = self._halves(z)
        if up is not None and self.interleaved:
            gate, up = gate.contiguous(), up.contiguous()
        return gate, up

    def _limited(self, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what act takes, and what multiplies it."""
        # A clamp has a gradient exactly at its limit in some versions of torch, and none in others.
        if self.limit is not None:
            gate = torch.where(gate > self.limit, self.limit, gate)
            if up is not None:
                up = torch.where(up > self.limit, self.limit, up)
                up = torch.where(up < -self.limit, -self.limit, up)
        offset = _FUNCTIONS[self.name].up_offset
        return gate, up + offset if up is not None and offset else up


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
