# SPDX-License-Identifier: Apache-2.0
"""Describe the routed rows of an expert layer and their activation, and launch that as a kernel of its own.

T num_tokens, K top_k, R = T * K routed rows in expert order, H hidden_size, I intermediate_size, U
columns of z: 2 * I with a gate, else I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_ops._triton.kernels.experts import _expert_activation_bwd_kernel
from moe_ops._triton.launch import cdiv, launch, next_power_of_2, strides, unit_of
from moe_ops._triton.rows import in_expert_order
from moe_ops._triton.schedule import Rows


@dataclass(frozen=True)
class Activation:
    """Name an activation and the limit of its input, in the form that kernels take."""

    name: str
    limit: float | None

    @property
    def bound(self) -> float:
        """Return the kernel's argument `limit`, or 0 without a limit: no kernel reads it then."""
        return 0.0 if self.limit is None else self.limit

    @property
    def options(self) -> dict[str, Any]:
        """Return the kernel's constexpr arguments."""
        return {"ACTIVATION": self.name, "HAS_LIMIT": self.limit is not None}


@dataclass(slots=True)
class RoutedRows:
    """Describe the routed rows of an expert layer, and the activation that they get.

    Attributes:
        rows: the rows of each expert, and their slots.
        scatter_indices ((R,), index): the row of each slot.
        activation: the activation of z.
        gated: whether act(gate) multiplies up.
        interleaved: whether gate and up are the even and the odd columns of z.
        kernel_config: the caller's configurations.
    """

    rows: Rows
    scatter_indices: torch.Tensor
    activation: Activation
    gated: bool
    interleaved: bool
    kernel_config: str | None

    @property
    def has_halves(self) -> bool:
        """Return whether gate and up are the halves of z."""
        return self.gated and not self.interleaved

    def in_expert_order(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Copy the rows of x (T, H) into expert order, (R, H), times their weights if given."""
        assert self.rows.gather is not None
        return in_expert_order(x, self.rows.gather, self.scatter_indices, self.rows.top_k, weights)


def activate(routed: RoutedRows, z: torch.Tensor, used_rows: torch.Tensor, h: torch.Tensor) -> None:
    """Write h = act(z), (R, I); the rows from used_rows[0] on may stay as they are."""
    launch_activation(routed, z, used_rows, None, None, None, h, None)


def launch_activation(
    routed: RoutedRows,
    z: torch.Tensor,
    used_rows: torch.Tensor,
    scale: torch.Tensor | None,
    dh: torch.Tensor | None,
    dz: torch.Tensor | None,
    h: torch.Tensor | None,
    dots: torch.Tensor | None,
) -> None:
    """Launch _expert_activation_bwd_kernel; h may be dh itself."""
    if z.shape[0] == 0:
        return
    rows = routed.rows
    width = z.shape[1] // 2 if routed.gated else z.shape[1]
    block_rows, block_i, warps = _activation_block(width)
    # dh and h are laid out alike.
    of_h = dh if h is None else h
    stride_h = width if of_h is None else of_h.stride(0)
    unit = unit_of(width, stride_h)
    z = z.contiguous()
    launch(
        _expert_activation_bwd_kernel, (cdiv(rows.num_rows, block_rows),),
        dh, z, scale, rows.gather, used_rows, dz, h, dots,
        rows.num_rows, width // unit, rows.top_k, routed.activation.bound, *strides(scale),
        stride_h // unit,
        UNIT=unit, ROWS=block_rows, BLOCK_I=block_i, GATED=routed.gated,
        INTERLEAVED=routed.interleaved,
        HAS_SCALE=scale is not None, LOAD_DH=dh is not None, STORE_DZ=dz is not None,
        STORE_H=h is not None, STORE_DOTS=dots is not None, num_warps=warps,
        **routed.activation.options,
        on=z,
    )  # fmt: skip


def _activation_block(width: int) -> tuple[int, int, int]:
    """Return the rows, columns and warps of a block of the activation's backward.

    That kernel is bound by memory. So a thread holds 8 to 16 numbers, and little of a block lies
    past the width.
    """
    for columns in (2048, 1024, 512):
        if cdiv(width, columns) * columns <= 1.1 * width:
            return max(1, 1024 // columns), columns, 2 if width <= min(columns, 1024) else 4
    columns = min(256, next_power_of_2(width))
    return min(16, 1024 // columns), columns, 4
