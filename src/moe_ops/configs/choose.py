# SPDX-License-Identifier: Apache-2.0
"""Which configuration a launch gets.

In this order: what the caller gave as kernel_config; what was tuned on this machine (cache.py); what
is shipped for this GPU (tables/); what the heuristics here compute from the problem, the GPU's
shared memory and its number of SMs.

M rows, N columns and K contracted elements of one expert's product; in dW the contracted are rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from moe_ops.configs import cache
from moe_ops.configs.kernel_config import (
    TURNS_TILE,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    parse,
)


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on, without the exact number of rows.

    Attributes:
        kind: a key of PASSES.
        dtype: such as "bfloat16".
        num_experts, out_features, in_features: E, N, D of the op.
        rows: the mean number of rows per expert, rounded up to a power of two.
        flags: what else the kernel does, of "gather" (rows of x are gathered), "scatter" (rows of
            the output are scattered), "scale" (they are multiplied by topk_weights), "bias", "dots"
            (the router gradient), "transposed" (the weight is a transposed view), "fp8" (the weight
            is, with scales), "gated" (what follows is the activation of a gated block; after dX its
            backward, where Hopper has a kernel that does both), "activated" (the activation of
            another), in this order.
    """

    kind: str
    dtype: str
    num_experts: int
    out_features: int
    in_features: int
    rows: int
    flags: tuple[str, ...] = ()

    @property
    def has_activation(self) -> bool:
        """Whether the kernel computes an activation of its product."""
        return self.kind == "forward" and not {"gated", "activated"}.isdisjoint(self.flags)

    @property
    def key(self) -> str:
        """The problem as one string: the key of tables and caches."""
        sizes = f"E{self.num_experts} N{self.out_features} D{self.in_features} rows{self.rows}"
        return " ".join([self.kind, self.dtype, sizes, *self.flags])


@dataclass(frozen=True)
class Device:
    """What the heuristics know of a GPU; a CPU, where Triton is interpreted, has capability 0.0."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    num_sms: int

    @property
    def has_tma(self) -> bool:
        """Whether it has a tensor memory accelerator, which loads what descriptors describe."""
        return self.capability >= (9, 0)


# The compute capability's first number.
HOPPER = 9
# Mean rows per expert up to which a product is bound by reading the weight.
FEW_ROWS = 32
# The largest side of a weight that is taken for a LoRA's rank.
_NARROW = 64
# The activation's backward on top of a tile, in _triton/kernels/hopper_experts.py, takes so many columns at a
# time, or half of them.
_CHUNK_COLUMNS = 32


@functools.cache
def device_of(device: torch.device) -> Device:
    """The facts of a torch device."""
    if device.type != "cuda":
        return Device("cpu", (0, 0), 1 << 20, 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.multi_processor_count,
    )


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The mean number of rows per expert, rounded up to a power of two; at least 1."""
    mean = -(-num_rows // max(num_experts, 1))
    return 1 << max(mean - 1, 0).bit_length()


def choose(problem: Problem, device: Device, kernel_config: str | None) -> KernelConfig:
    """The configuration of one launch."""
    if kernel_config is not None:
        given = parse(kernel_config).get(problem.kind)
        if given is not None:
            return given
    return _chosen(problem, device)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: Device) -> KernelConfig:
    tuned = cache.lookup(device.name, problem.key)
    return tuned or shipped(device.name).get(problem.key) or heuristic(problem, device)


cache.on_change.append(_chosen.cache_clear)


def forget() -> None:
    """Makes the next launches choose anew, and read the disk cache anew."""
    cache.forget()


@functools.cache
def shipped(device_name: str) -> dict[str, KernelConfig]:
    """The table that comes with the package for this GPU, by Problem.key; empty without one."""
    file = resources.files("moe_ops.configs") / "tables" / f"{cache.table_name(device_name)}.json"
    if not file.is_file():
        return {}
    return cache.parse_table(file.read_text(encoding="utf-8"))


def heuristic(problem: Problem, device: Device) -> KernelConfig:
    """A configuration by rules, without tuning: it compiles and fits the GPU's shared memory."""
    is_dw = problem.kind == "backward_dW"
    config = _heuristic_dw(problem, device) if is_dw else _heuristic_gemm(problem, device)
    return fitting(_narrowed(config, problem), problem, device)


def _narrowed(config: KernelConfig, problem: Problem) -> KernelConfig:
    """For a weight with a side of a LoRA's rank, blocks no wider than that.

    Such products are bound by the matrix of rows that they read or write: several programs an SM
    keep that going.
    """
    sides = {"BLOCK_N": problem.out_features, "BLOCK_K": problem.in_features}
    narrow: dict[str, Any] = {
        name: max(16, 1 << (side - 1).bit_length())
        for name, side in sides.items()
        if side <= _NARROW and problem.rows > FEW_ROWS and "fp8" not in problem.flags
    }
    narrow = {name: size for name, size in narrow.items() if size < getattr(config, name)}
    if not narrow:
        return config
    others: dict[str, Any] = {
        name: min(getattr(config, name), 128) for name in sides if name not in narrow
    }
    warps = 8 if "dots" in problem.flags else 4
    return replace(
        config, num_warps=warps, num_stages=4, programs_per_sm=2, epilogue_subtile=1,
        warp_specialize=False, **narrow, **others,
    )  # fmt: skip


def _heuristic_gemm(problem: Problem, device: Device) -> KernelConfig:
    """Forward and dX are one kernel: m, n, k are its tile, whatever the pass calls its sides."""
    # Triton reads rows in vectors where their width is a multiple of 16. Elsewhere it reads number
    # by number, whose addresses take registers that the tile then lacks.
    is_even = problem.out_features % 16 == 0 and problem.in_features % 16 == 0
    has_tma = device.has_tma and is_even
    has_dots, is_fp8 = "dots" in problem.flags, "fp8" in problem.flags
    # What comes after the product of an activation takes the registers of half a tile at most.
    subtile = 2 if problem.has_activation else 1
    stages, per_sm, store, is_specialized = 3, 1, False, False
    if problem.dtype == "float32":
        m, n, has_tma = 64, 64, False
        # FP8 weights take a second accumulator.
        k, warps = (16, 8) if is_fp8 else (32, 4)
    elif device.capability < (8, 0):
        m, n, k, warps, has_tma = 64, 64, 16, 8, False
    elif problem.rows <= FEW_ROWS:
        # Decoding: a few rows an expert, bound by reading the weights. Descriptors gain nothing
        # there and cost host time.
        m, n, per_sm = (16, 64, 4) if problem.rows <= 8 else (32, 64 if is_fp8 else 128, 2)
        k, warps, has_tma = 128, 4, False
        if m == 32 and device.shared_memory < 160 * 1024:
            # Fewer steps ahead, so that an SM holds both programs.
            stages = 2
    elif is_fp8:
        # A second accumulator takes the registers of a wider tile. What decodes a weight serves all
        # rows of the tile.
        m, n = 64 if problem.rows <= 64 else 128, 128 if is_even else 64
        k, warps, store = 128 if has_tma else 64 if is_even else 32, 8, has_tma and not has_dots
    elif has_tma and has_dots:
        # The rows that x @ b is multiplied with take the registers of a wider tile.
        m, n, k, warps, stages = 128, 128, 64, 8, 4
    elif has_tma and problem.rows <= 64:
        m, n, k, warps, stages, store = 64, 256, 64, 4, 4, True
    elif (
        device.capability[0] == HOPPER
        and has_tma
        # Without a bias the kernel that gathers its rows is as fast, more or less.
        and (not problem.has_activation or "bias" in problem.flags)
        and specializes(problem, TURNS_TILE)
    ):
        (m, n), k, warps, store, is_specialized = TURNS_TILE, 64, 8, True, True
        # More stages where what is stored passes through smaller buffers.
        is_gated_dx = "gated" in problem.flags and not problem.has_activation
        stages, subtile = (4, 1) if is_gated_dx else (6, 2)
    elif (
        has_tma
        and problem.has_activation
        and (not {"activated", "bias"}.isdisjoint(problem.flags) or device.capability >= (10, 0))
    ):
        # The activation's own registers, and a bias, leave room for half of the widest tile.
        m, n, k, warps, stages, store = 128, 128, 64, 8, 4, True
    elif (
        device.capability[0] == HOPPER
        and has_tma
        and problem.kind == "forward"
        and "gather" in problem.flags
        and not problem.has_activation
        and problem.rows > 256
    ):
        # Two programs an SM: one gathers its rows, or stores its tile, while the other multiplies. An
        # expert of few rows is bound by its weight, which a narrower tile reads more often; in dX
        # the wide tile is the faster one.
        m, n, k, warps, store, per_sm, subtile = 128, 128, 64, 4, True, 2, 2
    elif has_tma:
        m, n, k, warps, store = 128, 256, 64, 8, True
    else:
        m, n, k, warps = 128, 128 if is_even else 64, 32, 8
    common: dict[str, Any] = {
        "BLOCK_M": m, "num_warps": warps, "num_stages": stages, "group_m": 16 if has_tma else 8,
        "programs_per_sm": per_sm, "use_tma_store": store, "use_tma_load_w": has_tma,
        "epilogue_subtile": subtile if has_tma else 1,
        # Flattened, the dots spill on Blackwell.
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
    # Two programs an SM: one stores its tile while the other multiplies. With many rows that does
    # not pay for the narrower tile.
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


def specializes(problem: Problem, tile: tuple[int, int]) -> bool:
    """Whether kernels/hopper*.py have a kernel for that, on Hopper.

    tile: rows and columns, as of KernelConfig.tile.
    """
    flags = set(problem.flags)
    if problem.has_activation:
        # Rows that are to be gathered are copied before it.
        return flags - {"gather", "bias"} == {"gated"} and tile == TURNS_TILE
    # What is gated in dX is done by two kernels where the tile is another.
    flags -= {"transposed", "gated"}
    return flags <= {"scatter", "scale", "bias"} if tile == TURNS_TILE else not flags


def is_flattened(config: KernelConfig, problem: Problem) -> bool:
    """Whether the kernel's two loops overlap, where the configuration asks for it."""
    # Triton would not load ahead of a sum that begins with a bias. The inner loop of dW is as long
    # as an expert: Triton does not flatten it.
    return config.flatten and problem.kind != "backward_dW" and "bias" not in problem.flags


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
    used = _turns_operands(config) + 2 * _turns_slots(config) + 2 * _BARRIERS
    return 2 if used <= device.shared_memory else 1


def _turns_operands(config: KernelConfig) -> int:
    """Bytes of shared memory of the ring of 16-bit operands."""
    rows, columns, contracted = config.tile
    return (rows + columns) * contracted * 2 * config.num_stages


def _turns_slots(config: KernelConfig) -> int:
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
    if config.is_in_turns and specializes(problem, TURNS_TILE):
        # Each of the two groups has a tile of its own to store.
        stored = 2 * rows * columns * 2 // config.epilogue_subtile
        if problem.kind == "backward_dX" and "gated" in problem.flags:
            stored = epilogue_slots(config, device) * _turns_slots(config)
        return _turns_operands(config) + stored + 2 * _BARRIERS
    if problem.kind == "backward_dW" and "transposed" in problem.flags:
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
    if config.use_tma_store and device.has_tma and "scatter" not in problem.flags:
        has_tails = getattr(config, "tail_tiles", False)
        # A tile of half the height has a buffer of its own.
        stored = tile + tile // 2 if has_tails else tile
        if "gated" in problem.flags and problem.has_activation:
            # Half of the pre-activation at a time; the output, half as wide, in a buffer of its own
            # unless it has the same shape.
            half = rows * columns // 2 * size
            stored = half if config.epilogue_subtile == 1 else half + half // 2
    # What pointers store, or dots are taken of, goes from warp to warp through shared memory first.
    exchanged = 0
    if not stored or "dots" in problem.flags:
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
