# SPDX-License-Identifier: Apache-2.0
"""Checks the options of the fused blocks, and passes them to the GEMMs."""

from __future__ import annotations

from typing import Any

from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)


def check_gradients(owner: str, *, dW_only: bool, dX_only: bool) -> None:
    """Raise ValueError if both are given: no gradient would be left."""
    if dW_only and dX_only:
        raise ValueError(f"{owner}: expected dW_only or dX_only or neither, got both")


def gemm_options(block: Any) -> dict[str, Any]:
    """Return a fused block's options as the arguments of moe_ops.compat.grouped_gemm.

    dW_only is not among them. The first weight's gradient needs the second GEMM's input gradient, so the
    GEMMs compute their input gradients. The block detaches its own input instead.
    """
    return {
        "kernel_config_fwd": block.kernel_config_fwd,
        "kernel_config_bwd_dW": block.kernel_config_bwd_dW,
        "kernel_config_bwd_dX": block.kernel_config_bwd_dX,
        "autotune": block.autotune,
        "dX_only": block.dX_only,
    }


def check_tuning(
    owner: str,
    autotune: bool,
    kernel_config_fwd: KernelConfigForward | None,
    kernel_config_bwd_dW: KernelConfigBackward_dW | None,
    kernel_config_bwd_dX: KernelConfigBackward_dX | None,
) -> None:
    """Raise if a configuration belongs to another GEMM or meets autotune=True.

    Raises:
        TypeError: a configuration has another class.
        ValueError: a configuration is given with autotune=True.
    """
    for name, kind, config in (
        ("kernel_config_fwd", KernelConfigForward, kernel_config_fwd),
        ("kernel_config_bwd_dW", KernelConfigBackward_dW, kernel_config_bwd_dW),
        ("kernel_config_bwd_dX", KernelConfigBackward_dX, kernel_config_bwd_dX),
    ):
        if config is None:
            continue
        if not isinstance(config, kind):
            got = type(config).__name__
            raise TypeError(f"{owner}: expected {name} to be a {kind.__name__}, got {got}")
        if autotune:
            raise ValueError(
                f"{owner}: expected {name}=None with autotune=True, got a {kind.__name__}; "
                f"pass autotune=False to use it"
            )
