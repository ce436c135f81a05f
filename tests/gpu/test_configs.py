# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its gradients are right with configurations that a caller gives."""

from typing import Any

import pytest
import torch

import moe_ops
from testing.gemm_problem import MODES, check, problem

pytestmark = pytest.mark.gpu

# T, K, E, N, D: the last tile of every dimension is a part of one.
SHAPE = (700, 4, 6, 712, 328)
TMA = {"use_tma_store": True, "use_tma_load_w": True}


def configs(rows: dict[str, Any], contracted: dict[str, Any]) -> str:
    """Return configurations with one tile for forward and dX and another for dW."""
    columns, depth = rows.pop("columns"), rows.pop("depth")
    tma_rows = rows.get("use_tma_load_w", False)
    return moe_ops.kernel_config(
        moe_ops.KernelConfigForward(
            BLOCK_N=columns, BLOCK_K=depth, use_tma_load_x=tma_rows, **rows
        ),
        moe_ops.KernelConfigBackward_dX(
            BLOCK_K=columns, BLOCK_N=depth, use_tma_load_dy=tma_rows, **rows
        ),
        moe_ops.KernelConfigBackward_dW(**contracted),
    )


def dw(
    block_m: int, block_n: int, block_k: int, warps: int, stages: int, **more: Any
) -> dict[str, Any]:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "num_warps": warps, "num_stages": stages, **more}


def tile(m: int, columns: int, depth: int, warps: int, stages: int, **more: Any) -> dict[str, Any]:
    sizes = {"BLOCK_M": m, "columns": columns, "depth": depth}
    return {**sizes, "num_warps": warps, "num_stages": stages, **more}


LOADED = {"use_tma_load_dy": True, "use_tma_load_x": True}
SPECIALIZED = {"warp_specialize": True, "use_tma_store": True}
CONFIGS = {
    "specialized": (
        tile(128, 256, 64, 8, 3, use_tma_load_w=True, **SPECIALIZED),
        dw(32, 128, 256, 8, 6, **LOADED, **SPECIALIZED),
    ),
    "wide": (tile(128, 256, 64, 8, 3, **TMA), dw(64, 128, 256, 8, 3, **LOADED)),
    "low": (tile(64, 256, 64, 4, 4, **TMA), dw(32, 128, 128, 4, 4, programs_per_sm=2, **LOADED)),
    "tail tiles": (
        tile(128, 128, 64, 8, 3, tail_tiles=True, flatten=False, **TMA),
        dw(32, 256, 128, 8, 3, flatten=False, use_tma_store=True, **LOADED),
    ),
    "tail tiles by pointers": (
        tile(64, 128, 32, 4, 3, tail_tiles=True, flatten=False),
        dw(64, 64, 64, 4, 3, use_tma_load_x=True),
    ),
    "pointers, flattened": (tile(128, 128, 32, 8, 3), dw(32, 128, 128, 8, 3)),
    "store alone": (tile(64, 128, 64, 4, 3, use_tma_store=True), dw(64, 64, 128, 4, 3, **LOADED)),
    "in halves": (
        tile(128, 128, 64, 8, 4, epilogue_subtile=2, **TMA),
        dw(64, 128, 128, 4, 3, epilogue_subtile=2, use_tma_store=True, **LOADED),
    ),
    "in halves, by pointers": (
        tile(128, 128, 32, 4, 3, epilogue_subtile=2, programs_per_sm=2),
        dw(64, 256, 128, 8, 4, epilogue_subtile=2, use_tma_store=True, **LOADED),
    ),
    "few rows": (tile(16, 64, 128, 4, 3, flatten=False), dw(16, 64, 64, 4, 2, flatten=False)),
    "few rows, following on": (
        tile(16, 64, 128, 4, 3, flatten=False, launch_pdl=True),
        dw(16, 64, 64, 4, 2, flatten=False),
    ),
    "following on": (
        tile(64, 128, 64, 4, 3, launch_pdl=True, **TMA),
        dw(64, 64, 128, 4, 3, **LOADED),
    ),
    "few rows, many programs": (
        tile(32, 32, 64, 4, 3, flatten=False, programs_per_sm=4, use_tma_load_w=True),
        dw(32, 32, 256, 4, 3, use_tma_load_dy=True, group_m=1),
    ),
}


# The router gradient's rows leave no shared memory for the wider tiles.
CASES = [
    (name, mode)
    for name in CONFIGS
    for mode in MODES
    if name not in ("wide", "low", "specialized") or "weights" not in mode
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_configurations(name, mode):
    rows, contracted = CONFIGS[name]
    given = problem(SHAPE, torch.bfloat16, routing="dropped", **MODES[mode])
    given.arguments["kernel_config"] = configs(dict(rows), contracted)
    check(given)


def test_too_large():
    given = problem(SHAPE, torch.bfloat16)
    config = moe_ops.KernelConfigForward(BLOCK_M=256, BLOCK_N=256, BLOCK_K=256, num_stages=4)
    given.arguments["kernel_config"] = moe_ops.kernel_config(config)
    with pytest.raises(ValueError, match="kernel_config does not fit this GPU"):
        given.run()
