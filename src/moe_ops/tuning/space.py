# SPDX-License-Identifier: Apache-2.0
"""Lists the configurations that tuning tries for a problem.

These are a few good tiles, and the best of them with one field changed. All combinations of the
fields would be thousands for each problem, and each compiles for seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.footprint import fitting, shared_memory
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import (
    TALL_TILE,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.problem import FEW_ROWS, TALL_ROWS, Problem, dense_operands
from moe_ops.configs.specialize import why_not_specialized

MAX_CANDIDATES = 36

_Tile = tuple[int, int, int, int, int]

# A tile is (rows, columns, contracted elements, num_warps, num_stages) in forward and dX, and
# (out_features, in_features, contracted rows, num_warps, num_stages) in dW. The most promising tiles
# come first.
_TMA_TILES = (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 5), (64, 256, 64, 8, 4),
    (64, 256, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 4, 5),
)  # fmt: skip
# Halves: the tile is stored in two halves, which leaves room for one more stage. Pairs: two programs
# share an SM, and one stores while the other multiplies.
_TMA_HALVES = ((128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 256, 64, 8, 3))
_TMA_PAIRS = ((128, 128, 32, 4, 4), (128, 128, 64, 4, 3), (64, 256, 32, 4, 4))
# Warp-specialised tiles of Hopper with their epilogue_subtile: one warp loads, two groups multiply.
_SPECIALIZED: tuple[tuple[_Tile, int], ...] = (
    ((128, 128, 64, 8, 6), 2), ((128, 128, 64, 8, 5), 1), ((128, 256, 64, 8, 3), 1),
    ((128, 256, 32, 8, 6), 1), ((192, 256, 64, 8, 3), 1),
)  # fmt: skip
_POINTER_TILES = (
    (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3),
    (256, 128, 32, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (64, 128, 32, 4, 4),
    (64, 256, 32, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (128, 128, 64, 8, 2),
)  # fmt: skip
# Tiles for few rows leave the rows out: (columns, contracted elements, num_warps, num_stages).
_FEW_ROWS_TILES = (
    (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 5), (32, 128, 4, 4), (32, 256, 4, 3),
    (64, 256, 4, 3), (64, 256, 8, 3), (64, 64, 4, 5), (128, 64, 4, 4), (128, 128, 4, 3),
    (128, 128, 8, 3), (128, 128, 8, 4),
)  # fmt: skip
# Tiles of all three passes without tensor cores: each number takes more registers, and there is no
# pipeline to fill.
_PLAIN_TILES = (
    (64, 64, 32, 4, 3), (64, 64, 32, 4, 2), (64, 64, 16, 4, 4), (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 128, 32, 8, 2),
    (128, 128, 16, 8, 3), (32, 64, 32, 4, 3), (32, 128, 32, 4, 3), (32, 32, 32, 4, 3),
)  # fmt: skip
_PLAIN_FEW_ROWS_TILES = (
    (64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 2, 4), (32, 128, 4, 3),
    (128, 32, 4, 3), (128, 64, 8, 2),
)  # fmt: skip
_DW_TMA_TILES = (
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (256, 128, 32, 8, 4),
    (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 5), (128, 128, 128, 8, 3), (64, 256, 64, 8, 4), (64, 256, 64, 4, 4),
    (128, 128, 32, 4, 5),
)  # fmt: skip
_DW_HALVES = ((128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 256, 32, 8, 8))
_DW_PAIRS = ((128, 128, 64, 4, 3), (128, 128, 32, 4, 6), (128, 128, 32, 4, 4))
_DW_SPECIALIZED: tuple[tuple[_Tile, int], ...] = (
    ((128, 256, 32, 8, 6), 1), ((128, 128, 64, 8, 6), 2), ((256, 128, 32, 8, 6), 1),
    ((128, 128, 32, 8, 8), 1),
)  # fmt: skip
_DW_POINTER_TILES = (
    (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3),
    (256, 128, 32, 8, 3), (128, 256, 64, 8, 3), (64, 256, 32, 8, 3), (128, 64, 64, 4, 3),
    (64, 128, 32, 4, 4), (64, 64, 32, 4, 4),
)  # fmt: skip
# With few rows an expert's sum has one or two steps, and most of the time goes to storing it.
_DW_FEW_ROWS_TILES = (
    (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (128, 128, 32, 8, 3), (128, 128, 32, 4, 3),
    (128, 256, 16, 8, 3), (128, 128, 16, 4, 3), (64, 256, 32, 4, 3), (64, 128, 16, 4, 4),
)  # fmt: skip


def candidates(problem: Problem, device: Device) -> list[KernelConfig]:
    """Return the configurations to try for a problem, with the heuristic's choice first.

    They differ, fit the GPU's shared memory, and are at most MAX_CANDIDATES.
    """
    tried = _of_dw if problem.kind == "backward_dW" else _of_gemm
    found = [heuristic(problem, device)]
    found += (fitting(config, problem, device) for config in tried(problem, device))
    fits = (c for c in found if shared_memory(c, problem, device) <= device.shared_memory)
    return list(islice(dict.fromkeys(fits), MAX_CANDIDATES))


def _has_tensor_cores(problem: Problem, device: Device) -> bool:
    return problem.dtype != "float32" and device.capability >= (8, 0)


def _has_tma(problem: Problem, device: Device) -> bool:
    """Return whether descriptors can read the operands: the GPU has them, rows are 16-byte multiples."""
    return device.has_tma and all(dense_operands(problem))


def _of_gemm(problem: Problem, device: Device) -> Iterator[KernelConfig]:
    has_cores = _has_tensor_cores(problem, device)
    tma = has_cores and _has_tma(problem, device)
    if problem.rows <= FEW_ROWS:
        tiles = _FEW_ROWS_TILES if has_cores else _PLAIN_FEW_ROWS_TILES
        height, other = (16, 32) if problem.rows <= 16 else (32, 16)
        base = [_gemm(problem, (height, *tile), programs_per_sm=4) for tile in tiles]
        yield from base
        yield from (_gemm(problem, (other, *tile), programs_per_sm=4) for tile in tiles[:2])
        yield replace(base[0], programs_per_sm=2)
        if device.has_tma:
            yield from (replace(config, launch_pdl=True) for config in base[:4])
        if tma:
            yield from (replace(config, use_tma_load_w=True) for config in base[:8])
        return
    if not has_cores:
        base = [_gemm(problem, tile) for tile in _PLAIN_TILES]
    elif tma:
        base = [_gemm(problem, tile, tma=True) for tile in _TMA_TILES]
    else:
        base = [_gemm(problem, tile) for tile in _POINTER_TILES]
    # Few rows waste most of a high tile, so those come last.
    base.sort(key=lambda config: problem.rows <= 64 < config.BLOCK_M)
    yield from base[:5]
    if tma and device.capability[0] == HOPPER:
        yield from _specialized(problem)
    if tma:
        store = not problem.scatter
        for tile in _TMA_HALVES:
            config = _gemm(problem, tile, tma=True)
            yield replace(config, use_tma_store=store, epilogue_subtile=2)
        for tile in _TMA_PAIRS:
            config = _gemm(problem, tile, tma=True, programs_per_sm=2)
            yield replace(config, use_tma_store=store, epilogue_subtile=2)
    for config in base[:2]:
        yield replace(config, tail_tiles=True, flatten=False)
        if not problem.bias:  # With a bias, flatten has no effect.
            yield replace(config, flatten=not config.flatten)
        yield replace(config, group_m=4)
        yield replace(config, group_m=16)
        if not tma:
            yield replace(config, programs_per_sm=2)
        elif not problem.scatter:
            yield replace(config, use_tma_store=True)
    yield from base[5:]
    if tma:
        yield from (_gemm(problem, tile, programs_per_sm=2) for tile in _POINTER_TILES[:2])


def _specialized(problem: Problem) -> Iterator[KernelConfig]:
    # The specialised kernels read rows in order: gathered ones are copied first.
    loads = replace(problem, gather=False)
    for tile, subtile in _SPECIALIZED:
        if tile[:2] == TALL_TILE and problem.rows > TALL_ROWS:
            continue
        if why_not_specialized(problem, tile[:2]) is None:
            config = _gemm(
                loads, tile, tma=True,
                use_tma_store=True, warp_specialize=True, epilogue_subtile=subtile,
            )  # fmt: skip
            # Most experts are one tall tile, so no row tiles share a weight.
            yield replace(config, group_m=1) if tile[:2] == TALL_TILE else config


def _gemm(
    problem: Problem,
    tile: _Tile,
    *,
    tma: bool = False,
    **fields: Any,
) -> KernelConfigForward | KernelConfigBackward_dX:
    m, n, k, warps, stages = tile
    # Gathered rows are read by pointers.
    tma_rows = tma and not problem.gather
    flatten = tma and not problem.bias
    if problem.kind == "forward":
        return KernelConfigForward(
            BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages, flatten=flatten,
            use_tma_load_x=tma_rows, use_tma_load_w=tma, **fields,
        )  # fmt: skip
    return KernelConfigBackward_dX(
        BLOCK_M=m, BLOCK_K=n, BLOCK_N=k, num_warps=warps, num_stages=stages, flatten=flatten,
        use_tma_load_dy=tma_rows, use_tma_load_w=tma, **fields,
    )  # fmt: skip


def _of_dw(problem: Problem, device: Device) -> Iterator[KernelConfig]:
    has_cores = _has_tensor_cores(problem, device)
    tma = has_cores and _has_tma(problem, device)
    few = problem.rows <= FEW_ROWS
    tiles: tuple[_Tile, ...]
    if not has_cores:
        tiles = _PLAIN_TILES
    elif tma:
        tiles = _DW_FEW_ROWS_TILES if few else _DW_TMA_TILES
    else:
        tiles = _DW_FEW_ROWS_TILES + _DW_POINTER_TILES if few else _DW_POINTER_TILES
    base = [_dw(tile, tma=tma) for tile in tiles]
    yield from base[:4]
    if tma and device.capability[0] == HOPPER:
        for tile, subtile in _DW_SPECIALIZED:
            config = _dw(tile, tma=True)
            yield replace(config, warp_specialize=True, epilogue_subtile=subtile)
    if tma and not few:
        yield from (replace(_dw(tile, tma=True), epilogue_subtile=2) for tile in _DW_HALVES)
        for tile in _DW_PAIRS:
            config = _dw(tile, tma=True)
            yield replace(config, epilogue_subtile=2, programs_per_sm=2)
    yield from base[4:]
    for config in base[:2]:
        yield replace(config, group_m=8)
        yield replace(config, flatten=not config.flatten)
        yield replace(config, use_tma_store=False)
        if not tma:
            yield replace(config, programs_per_sm=2)
    if tma:
        yield from (_dw(tile, tma=False) for tile in _DW_POINTER_TILES[:3])


def _dw(tile: _Tile, *, tma: bool) -> KernelConfigBackward_dW:
    n, k, m, warps, stages = tile
    return KernelConfigBackward_dW(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages, group_m=4, flatten=tma,
        use_tma_load_dy=tma, use_tma_load_x=tma, use_tma_store=tma,
    )  # fmt: skip
