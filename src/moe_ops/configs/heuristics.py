# SPDX-License-Identifier: Apache-2.0
"""Compute a configuration by rules, without tuning.

m rows, n columns and k contracted elements of one expert's product. In dW m counts the contracted
rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.footprint import fitting
from moe_ops.configs.kernel_config import (
    PINGPONG_TILE,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.problem import FEW_ROWS, Problem
from moe_ops.configs.specialize import why_not_specialized

# A side of a weight up to this size counts as a LoRA's rank.
_NARROW = 64


def heuristic(problem: Problem, device: Device) -> KernelConfig:
    """Return a configuration by rules; it compiles and fits the GPU's shared memory."""
    is_dw = problem.kind == "backward_dW"
    config = _heuristic_dw(problem, device) if is_dw else _heuristic_gemm(problem, device)
    return fitting(_narrowed(config, problem), problem, device)


def _narrowed(config: KernelConfig, problem: Problem) -> KernelConfig:
    """Return the configuration with blocks no wider than a LoRA's rank, if the weight has one.

    Such a product is bound by reading or writing its matrix of rows. Two programs per SM keep that
    going.
    """
    sides = {"BLOCK_N": problem.out_features, "BLOCK_K": problem.in_features}
    narrow: dict[str, Any] = {
        name: max(16, 1 << (side - 1).bit_length())
        for name, side in sides.items()
        if side <= _NARROW and problem.rows > FEW_ROWS and not problem.fp8
    }
    narrow = {name: size for name, size in narrow.items() if size < getattr(config, name)}
    if not narrow:
        return config
    others: dict[str, Any] = {
        name: min(getattr(config, name), 128) for name in sides if name not in narrow
    }
    warps = 8 if problem.dots else 4
    return replace(
        config, num_warps=warps, num_stages=4, programs_per_sm=2, epilogue_subtile=1,
        warp_specialize=False, **narrow, **others,
    )  # fmt: skip


def _heuristic_gemm(problem: Problem, device: Device) -> KernelConfig:
    """Return a configuration of forward or dX, with m, n, k as the tile of their one kernel."""
    # Triton reads rows in vectors if their width is a multiple of 16. Else it reads number by
    # number, and the addresses take registers that the tile then lacks.
    is_even = problem.out_features % 16 == 0 and problem.in_features % 16 == 0
    has_tma = device.has_tma and is_even
    has_dots, is_fp8 = problem.dots, problem.fp8
    # With an activation on top there are registers to finish half a tile at a time.
    subtile = 2 if problem.has_activation else 1
    stages, per_sm, store, is_specialized = 3, 1, False, False
    if problem.dtype == "float32":
        m, n, has_tma = 64, 64, False
        # FP8 weights need a second accumulator.
        k, warps = (16, 8) if is_fp8 else (32, 4)
    elif device.capability < (8, 0):
        m, n, k, warps, has_tma = 64, 64, 16, 8, False
    elif problem.rows <= FEW_ROWS:
        # In decoding an expert has few rows, and reading the weights is the bound. Descriptors gain
        # nothing there and cost host time.
        m, n, per_sm = (16, 64, 4) if problem.rows <= 8 else (32, 64 if is_fp8 else 128, 2)
        k, warps, has_tma = 128, 4, False
        if m == 32 and device.shared_memory < 160 * 1024:
            # With fewer steps loaded ahead an SM has room for both programs.
            stages = 2
    elif is_fp8:
        # The second accumulator takes the registers of a wider tile. A weight is decoded once for
        # all rows of the tile.
        m, n = 64 if problem.rows <= 64 else 128, 128 if is_even else 64
        k, warps, store = 128 if has_tma else 64 if is_even else 32, 8, has_tma and not has_dots
    elif has_tma and has_dots:
        # The rows whose dots with x @ b are taken need the registers of a wider tile.
        m, n, k, warps, stages = 128, 128, 64, 8, 4
    elif has_tma and problem.rows <= 64:
        m, n, k, warps, stages, store = 64, 256, 64, 4, 4, True
    elif (
        device.capability[0] == HOPPER
        and has_tma
        # Without a bias the persistent kernel, which gathers its rows, is about as fast.
        and (not problem.has_activation or problem.bias)
        and why_not_specialized(problem, PINGPONG_TILE) is None
    ):
        (m, n), k, warps, store, is_specialized = PINGPONG_TILE, 64, 8, True, True
        # Smaller buffers for the stores leave room for more stages.
        is_gated_dx = problem.epilogue == "gated_activation_backward"
        stages, subtile = (4, 1) if is_gated_dx else (6, 2)
    elif (
        has_tma
        and problem.has_activation
        and (problem.epilogue == "activation" or problem.bias or device.capability >= (10, 0))
    ):
        # The registers of the activation and of a bias leave room for half of the widest tile.
        m, n, k, warps, stages, store = 128, 128, 64, 8, 4, True
    elif (
        device.capability[0] == HOPPER
        and has_tma
        and problem.kind == "forward"
        and problem.gather
        and not problem.has_activation
        and problem.rows > 256
    ):
        # With two programs per SM, one gathers its rows or stores its tile while the other
        # multiplies. Not for an expert of few rows: it is bound by reading its weight, and narrower
        # tiles read that more often. Not for dX: there the wide tile is faster.
        m, n, k, warps, store, per_sm, subtile = 128, 128, 64, 4, True, 2, 2
    elif has_tma:
        m, n, k, warps, store = 128, 256, 64, 8, True
    else:
        m, n, k, warps = 128, 128 if is_even else 64, 32, 8
    common: dict[str, Any] = {
        "BLOCK_M": m, "num_warps": warps, "num_stages": stages, "group_m": 16 if has_tma else 8,
        "programs_per_sm": per_sm, "use_tma_store": store, "use_tma_load_w": has_tma,
        "epilogue_subtile": subtile if has_tma else 1,
        # In a flattened loop the dots spill on Blackwell.
        "flatten": has_tma and not (has_dots and device.capability >= (10, 0)) and not is_fp8,
        "warp_specialize": is_specialized,
    }  # fmt: skip
    if problem.kind == "forward":
        return KernelConfigForward(BLOCK_N=n, BLOCK_K=k, use_tma_load_x=has_tma, **common)
    return KernelConfigBackward_dX(BLOCK_K=n, BLOCK_N=k, use_tma_load_dy=has_tma, **common)


def _heuristic_dw(problem: Problem, device: Device) -> KernelConfigBackward_dW:
    if problem.dtype == "float32" or device.capability < (8, 0):
        m = 32 if problem.dtype == "float32" else 16
        return KernelConfigBackward_dW(
            BLOCK_M=m, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3, flatten=False
        )
    if not device.has_tma:
        return KernelConfigBackward_dW(
            BLOCK_M=32, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=3, flatten=False
        )
    if device.capability[0] == HOPPER and min(problem.out_features, problem.in_features) >= 128:
        return KernelConfigBackward_dW(
            BLOCK_M=32, BLOCK_N=128, BLOCK_K=256, num_warps=8, num_stages=6, group_m=4,
            use_tma_load_dy=True, use_tma_load_x=True, use_tma_store=True, warp_specialize=True,
        )  # fmt: skip
    # With two programs per SM, one stores its tile while the other multiplies. With many rows that
    # gains less than the narrower tile costs.
    is_long = problem.rows >= 2048
    return KernelConfigBackward_dW(
        BLOCK_M=32,
        BLOCK_N=128,
        BLOCK_K=256 if is_long else 128,
        num_warps=8 if is_long else 4,
        num_stages=5 if is_long else 4,
        group_m=2 if is_long else 4,
        programs_per_sm=1 if is_long else 2,
        use_tma_load_dy=True,
        use_tma_load_x=True,
        use_tma_store=True,
        epilogue_subtile=1 if is_long else 2,
    )
