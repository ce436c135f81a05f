# SPDX-License-Identifier: Apache-2.0
"""How much shared memory a configuration takes, and what fits a GPU.

M rows, N columns and K contracted elements of one expert's product; in dW the contracted are rows.
"""

from __future__ import annotations

from dataclasses import replace

from moe_ops.configs.device import Device
from moe_ops.configs.kernel_config import PINGPONG_TILE, KernelConfig
from moe_ops.configs.problem import Problem
from moe_ops.configs.specialize import why_not_specialized

# The activation's backward on top of a tile, in _triton/kernels/hopper_experts.py, takes so many
# columns at a time, or half of them.
_CHUNK_COLUMNS = 32


def is_flattened(config: KernelConfig, problem: Problem) -> bool:
    """Whether the kernel's two loops overlap, where the configuration asks for it."""
    # Triton would not load ahead of a sum that begins with a bias. The inner loop of dW is as long
    # as an expert: Triton does not flatten it.
    return config.flatten and problem.kind != "backward_dW" and not problem.bias


def epilogue_columns(config: KernelConfig, activation: str, has_limit: bool) -> int:
    """The columns of a chunk: what the activation's backward on top of dX takes at a time.

    That is in _triton/kernels/hopper_experts.py.
    """
    columns = _CHUNK_COLUMNS // config.epilogue_subtile
    # The derivatives of others, and a limit, take more registers.
    is_simple = activation == "silu" and not has_limit
    return columns if is_simple else min(columns, _CHUNK_COLUMNS // 2)


def epilogue_slots(config: KernelConfig, device: Device) -> int:
    """How many chunks each group of warps has buffers for: two where the stages leave room."""
    used = _pingpong_operands(config) + 2 * _pingpong_slots(config) + 2 * _BARRIERS
    return 2 if used <= device.shared_memory else 1


def _pingpong_operands(config: KernelConfig) -> int:
    """Bytes of shared memory of the ring of 16-bit operands."""
    rows, columns, contracted = config.tile
    return (rows + columns) * contracted * 2 * config.num_stages


def _pingpong_slots(config: KernelConfig) -> int:
    """Bytes of shared memory of a slot of gate, up and h, of both groups."""
    return 2 * 3 * config.tile[0] * _CHUNK_COLUMNS // config.epilogue_subtile * 2


def shared_memory(config: KernelConfig, problem: Problem, device: Device) -> int:
    """Bytes of shared memory that each program of a launch needs, an upper bound.

    On Hopper Triton 3.6 to 3.9 take some percent less at most for 16-bit operands, half of it for
    fp32 that is not tf32, and a quarter where widths are no multiples of 16: those are not
    pipelined. FP8 weights, which count as what they are decoded to, take up to a fifth less. On
    other GPUs they take this or less.
    """
    rows, columns, contracted = config.tile
    if config.is_pingpong and why_not_specialized(problem, PINGPONG_TILE) is None:
        # Each of the two groups has a tile of its own to store.
        stored = 2 * rows * columns * 2 // config.epilogue_subtile
        if problem.epilogue == "gated_activation_backward":
            stored = epilogue_slots(config, device) * _pingpong_slots(config)
        return _pingpong_operands(config) + stored + 2 * _BARRIERS
    if problem.kind == "backward_dW" and problem.transposed:
        rows, columns = columns, rows
    size = 4 if problem.dtype == "float32" else 2
    # What is stored at a time.
    columns_stored = columns // config.epilogue_subtile
    tile = rows * columns_stored * size
    # Groups of four warps multiply out of shared memory; what is older multiplies out of registers,
    # so the buffers of one step are free by then.
    has_warp_groups = device.has_tma and rows >= 64 and config.num_warps % 4 == 0
    steps = config.num_stages if has_warp_groups else max(config.num_stages - 1, 1)
    if device.capability < (8, 0):
        # Multiplied as fp32, one step at a time.
        size, steps = 4, 1
    operands = (rows + columns) * contracted * size * steps
    stored = 0
    if config.use_tma_store and device.has_tma and not problem.scatter:
        has_tails = getattr(config, "tail_tiles", False)
        # A tile of half the height has a buffer of its own.
        stored = tile + tile // 2 if has_tails else tile
        if problem.epilogue == "gated_activation":
            # Half of the pre-activation at a time; the output, half as wide, in a buffer of its own
            # unless it has the same shape.
            half = rows * columns // 2 * size
            stored = half if config.epilogue_subtile == 1 else half + half // 2
    # What pointers store, or dots are taken of, goes from warp to warp through shared memory first.
    exchanged = 0
    if not stored or problem.dots:
        in_parts = has_warp_groups and problem.dtype != "float32"
        exchanged = _exchanged(rows, columns_stored, config.num_warps) if in_parts else tile
    # A flattened loop loads the next tile's operands at that time; otherwise theirs are free.
    barriers = 2 * _BARRIERS if config.warp_specialize else _BARRIERS
    if is_flattened(config, problem):
        return operands + exchanged + stored + barriers
    return max(operands, exchanged) + stored + barriers


def _exchanged(rows: int, columns: int, num_warps: int) -> int:
    """Bytes at a time of a 16-bit tile that goes from a warp group's layout to that of the stores.

    In the group's layout each warp has 16 rows of every 16 * num_warps; a store's thread has 8
    elements of one row. Where all threads store 8 rows at once or fewer, the 16 go in two halves.
    """
    rows_at_once = 8 * 32 * num_warps // columns
    return min(rows, 16 * num_warps) * columns * 2 // (2 if rows_at_once <= 8 else 1)


# Bytes, at most: 8 for each buffer that a descriptor loads, and their alignment; twice as many where
# warps of two kinds wait for each other.
_BARRIERS = 256


def fitting(config: KernelConfig, problem: Problem, device: Device) -> KernelConfig:
    """The same with fewer stages, down to 2, then smaller blocks, until it fits the shared memory.

    What does not fit with blocks of 16 is returned as it is.
    """
    while shared_memory(config, problem, device) > device.shared_memory:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
            continue
        widest = max(("BLOCK_K", "BLOCK_N", "BLOCK_M"), key=lambda name: getattr(config, name))
        if getattr(config, widest) == 16:
            break
        halved = {widest: getattr(config, widest) // 2}
        # Which has its own least blocks.
        config = replace(config, warp_specialize=False, **halved)
    return config
