# SPDX-License-Identifier: Apache-2.0
"""Compute how much shared memory a configuration takes, and make it fit a GPU.

An expert's product has rows, columns and contracted elements. In dW the contracted ones are rows.
"""

from __future__ import annotations

from dataclasses import replace

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.kernel_config import (
    PINGPONG_TILE,
    TALL_BLOCK_ROWS,
    TALL_TILE,
    KernelConfig,
)
from moe_ops.configs.problem import Problem
from moe_ops.configs.specialize import why_not_specialized

# With the activation's backward on top, a ping-pong kernel (_triton/kernels/hopper_experts.py)
# takes this many columns at a time, or half of them.
_CHUNK_COLUMNS = 32


def is_flattened(config: KernelConfig, problem: Problem) -> bool:
    """Return whether the kernel's two loops overlap as the configuration asks."""
    # If a sum begins with a bias, Triton loads nothing ahead in a flattened loop. The inner loop of
    # dW is as long as the expert, and Triton does not flatten it.
    return config.flatten and problem.kind != "backward_dW" and not problem.bias


def epilogue_columns(config: KernelConfig, activation: str, has_limit: bool) -> int:
    """Return the columns of a chunk.

    The activation's backward on top of dX (_triton/kernels/hopper_experts.py) takes one chunk at a
    time.
    """
    columns = _CHUNK_COLUMNS // config.epilogue_subtile
    # A limit, and the derivatives of other activations, take more registers.
    is_simple = activation == "silu" and not has_limit
    return columns if is_simple else min(columns, _CHUNK_COLUMNS // 2)


def epilogue_slots(config: KernelConfig, device: Device) -> int:
    """Return for how many chunks each group of warps has buffers: two if they fit, else one."""
    used = _pingpong_operands(config) + 2 * _pingpong_slots(config) + 2 * _BARRIERS
    return 2 if used <= device.shared_memory else 1


def _pingpong_operands(config: KernelConfig) -> int:
    """Return the bytes of shared memory that the ring of 16-bit operands takes."""
    rows, columns, contracted = config.tile
    return (rows + columns) * contracted * 2 * config.num_stages


def _pingpong_slots(config: KernelConfig) -> int:
    """Return the bytes that a slot of gate, up and h takes, in both groups together."""
    return 2 * 3 * config.tile[0] * _CHUNK_COLUMNS // config.epilogue_subtile * 2


def shared_memory(config: KernelConfig, problem: Problem, device: Device) -> int:
    """Return an upper bound of the shared memory, in bytes, that each program of a launch needs.

    On Hopper Triton 3.6 to 3.9 take at most some percent less for 16-bit operands. They take half
    of it for fp32 that is not tf32, and a quarter if pointers load widths that are no multiples of
    16: those products are not pipelined.
    On other GPUs all take this or less.
    """
    rows, columns, contracted = config.tile
    if config.is_pingpong and why_not_specialized(problem, PINGPONG_TILE) is None:
        # Each of the two groups has a tile of its own to store.
        stored = 2 * rows * columns * 2 // config.epilogue_subtile
        if problem.epilogue == "gated_activation_backward":
            stored = epilogue_slots(config, device) * _pingpong_slots(config)
        return _pingpong_operands(config) + stored + 2 * _BARRIERS
    if config.is_tall:
        is_served = device.capability[0] == HOPPER and problem.itemsize == 2
        if is_served and why_not_specialized(problem, TALL_TILE) is None:
            # Each group stores a part of 64 rows, of half the columns.
            operands = (rows + columns) * contracted * 2 * config.num_stages
            return operands + 64 * columns * 2 + 2 * _BARRIERS
        # The kernel in its place.
        rows = TALL_BLOCK_ROWS
    if problem.kind == "backward_dW" and problem.transposed:
        rows, columns = columns, rows
    size = problem.itemsize
    # The tile is stored in parts of this width.
    columns_stored = columns // config.epilogue_subtile
    tile = rows * columns_stored * size
    # Groups of four warps multiply from shared memory. Older instructions multiply from registers,
    # so one step's buffers are free by then.
    has_warp_groups = device.has_tma and rows >= 64 and config.num_warps % 4 == 0
    steps = config.num_stages if has_warp_groups else max(config.num_stages - 1, 1)
    if device.capability < (8, 0):
        # These GPUs multiply as fp32, one step at a time.
        size, steps = 4, 1
    operands = (rows + columns) * contracted * size * steps
    stored = 0
    if config.use_tma_store and device.has_tma and not problem.scatter:
        has_tails = getattr(config, "tail_tiles", False)
        # A tile of half the height has a buffer of its own.
        stored = tile + tile // 2 if has_tails else tile
        if problem.epilogue == "gated_activation":
            # The pre-activation is stored one half at a time. The output is half as wide, and has a
            # buffer of its own unless it has the same shape.
            half = rows * columns // 2 * size
            stored = half if config.epilogue_subtile == 1 else half + half // 2
    # A tile stored by pointers, or used for dots, first goes from warp to warp by shared memory.
    exchanged = 0
    if not stored or problem.dots:
        in_parts = has_warp_groups and problem.dtype != "float32"
        exchanged = _exchanged(rows, columns_stored, config.num_warps) if in_parts else tile
    # A flattened loop loads the next tile's operands meanwhile. Else their buffers are free.
    barriers = 2 * _BARRIERS if config.warp_specialize else _BARRIERS
    if is_flattened(config, problem):
        return operands + exchanged + stored + barriers
    return max(operands, exchanged) + stored + barriers


def _exchanged(rows: int, columns: int, num_warps: int) -> int:
    """Return the bytes that a 16-bit tile takes between the product's layout and the store's.

    In the product's layout each warp has 16 rows of every 16 * num_warps. In the store's layout a
    thread has 8 elements of one row. If all threads together store 8 rows or fewer at once, the
    16 rows go in two halves.
    """
    rows_at_once = 8 * 32 * num_warps // columns
    return min(rows, 16 * num_warps) * columns * 2 // (2 if rows_at_once <= 8 else 1)


# The most bytes that barriers take: 8 for each buffer that a descriptor loads, and their alignment.
# Warp-specialised kernels take twice as many: loading and multiplying warps wait for each other.
_BARRIERS = 256


def fitting(config: KernelConfig, problem: Problem, device: Device) -> KernelConfig:
    """Return the configuration, made to fit: with fewer stages, down to 2, then smaller blocks.

    If it does not fit with blocks of 16 either, those are returned.
    """
    while shared_memory(config, problem, device) > device.shared_memory:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
            continue
        if config.is_tall:
            config = replace(config, BLOCK_M=TALL_BLOCK_ROWS)
            continue
        widest = max(("BLOCK_K", "BLOCK_N", "BLOCK_M"), key=lambda name: getattr(config, name))
        if getattr(config, widest) == 16:
            break
        halved = {widest: getattr(config, widest) // 2}
        # Smaller blocks exclude warp_specialize, which has its own least blocks.
        config = replace(config, warp_specialize=False, **halved)
    return config
