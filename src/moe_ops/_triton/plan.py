# SPDX-License-Identifier: Apache-2.0
"""Decide which kernel computes a product, in which tile, and why, before anything is allocated.

    problem, operands, device, kernel_config -> plan

Launchers read the plan and decide nothing. The `explain` command shows it.

A persistent kernel serves every GPU. On Hopper a configuration may ask for a warp-specialised
kernel (warp_specialize). The tile makes it cooperative, tall or ping-pong (configs/specialize.py). If
that kernel cannot serve, the persistent one is the fallback: its result is the same, and the plan
says why.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from moe_ops._triton.hopper import why_no_kernels
from moe_ops._triton.launch import next_power_of_2
from moe_ops.configs import cache
from moe_ops.configs.choose import choose
from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.footprint import is_flattened
from moe_ops.configs.kernel_config import (
    TALL_BLOCK_ROWS,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.problem import Epilogue, Operands, Problem, copies
from moe_ops.configs.specialize import COOPERATIVE, PINGPONG, TALL, why_not_specialized

logger = logging.getLogger("moe_ops")

PERSISTENT = "persistent"

# With row tiles of at most this height a kernel finds its tiles itself, which saves the launch of
# the schedule.
_FINDS_TILES_ROWS = 32
# Columns that a kernel zeroes at a time.
BLOCK_W = 1024


@dataclass(frozen=True, eq=False)
class Plan:
    """Say how a product is computed, and why.

    M, N, K are a GEMM's: y (M, N) = x (M, K) @ b (K, N). In dW the left operand is transposed: the
    result is (N, D), and the M rows are contracted.

    Attributes:
        kernel: PERSISTENT, COOPERATIVE, TALL or PINGPONG.
        config: the configuration, in the letters of the pass.
        source: where it came from: "given", "tuned", "shipped" or "computed".
        tile: rows and columns of the result's tile, and how many elements a step contracts.
        tma: the operands that go through descriptors.
        computes_epilogue: whether the kernel also computes the problem's epilogue.
        copied: the operands that are first copied: gathered rows into expert order, others to where
            TMA can load them.
        finds_tiles: whether the kernel finds its tiles itself, without a schedule.
        tail_tiles: whether an expert's last rows may get a tile of half the height.
        options: the kernel's constexpr arguments, and Triton's own options.
        reason: why this kernel and this configuration.
        unmet: what the configuration asks for and cannot get, each with the reason.
    """

    kernel: str
    config: KernelConfig
    source: str
    tile: tuple[int, int, int]
    tma: Operands
    computes_epilogue: bool
    copied: Operands
    finds_tiles: bool
    tail_tiles: bool
    options: dict[str, Any]
    reason: str
    unmet: tuple[str, ...]

    @property
    def group_rows(self) -> int:
        """Return how many rows of a specialised kernel's tile one group of warps multiplies at once.

        All in ping-pong, half in a cooperative tile, a third in a tall one.
        """
        return self.tile[0] // {PINGPONG: 1, COOPERATIVE: 2, TALL: 3}[self.kernel]

    @property
    def group_columns(self) -> int:
        """Return how many columns of a specialised kernel's tile one group of warps multiplies."""
        return self.tile[1] // 2 if self.kernel == TALL else self.tile[1]


# One lookup, keyed by plain values only: a launch must cost the host little.
@functools.lru_cache(maxsize=4096)
def plan_once(
    kind: str,
    dtype: torch.dtype,
    num_experts: int,
    out_features: int,
    in_features: int,
    rows: int,
    gather: bool,
    scatter: bool,
    scale: bool,
    bias: bool,
    dots: bool,
    transposed: bool,
    epilogue: Epilogue,
    x: bool,
    b: bool,
    y: bool,
    device: Device,
    kernel_config: str | None,
    needs_schedule: bool,
) -> Plan:
    """Return a product's plan from a cache; log what a new plan's configuration cannot get.

    The arguments are the fields of Problem and of Operands, then those of `plan`.
    """
    name = str(dtype).removeprefix("torch.")
    problem = Problem(
        kind, name, num_experts, out_features, in_features, rows,
        gather, scatter, scale, bias, dots, transposed, epilogue,
    )  # fmt: skip
    made = plan(problem, Operands(x, b, y), device, kernel_config, needs_schedule)
    for wish in made.unmet:
        # A loop is asked to be flattened by default, so that one need not be a wish.
        is_wish = made.source == "given" and not wish.startswith(_FLATTEN)
        level = logging.WARNING if is_wish else logging.INFO
        _log_once(level, f"moe_ops: {kind} ({made.source} configuration): {wish}")
    return made


cache.on_change.append(plan_once.cache_clear)


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)


def plan(
    problem: Problem,
    operands: Operands,
    device: Device,
    kernel_config: str | None = None,
    needs_schedule: bool = False,
) -> Plan:
    """Return the plan of a product; the arguments and the tables alone determine it.

    Args:
        problem: the product.
        operands: which of its tensors TMA can describe.
        device: the GPU.
        kernel_config: the caller's configurations, as one string.
        needs_schedule: whether a later step reads the product's tile schedule.
    """
    copyable = copies(problem, device, operands)
    operands = Operands(*(a or b for a, b in zip(operands, copyable, strict=True)))
    choice = choose(problem, device, kernel_config, operands)
    config, source = choice.config, choice.source
    tile, wants = _tile_and_wishes(problem, config)
    copied = Operands(*(a and b for a, b in zip(copyable, wants.values(), strict=True)))
    obstacle = None
    kernel, reason = PERSISTENT, choice.reason
    if config.warp_specialize:
        obstacle = _obstacle(problem, operands, device, tile[:2])
        kernel = PINGPONG if config.is_pingpong else TALL if config.is_tall else COOPERATIVE
        if obstacle is not None and config.is_tall:
            tile = (TALL_BLOCK_ROWS, *tile[1:])
            obstacle += f"; the tiles have {TALL_BLOCK_ROWS} rows"
        if obstacle is not None:
            kernel, reason = PERSISTENT, obstacle
    few_rows = problem.kind != "backward_dW" and tile[0] <= _FINDS_TILES_ROWS
    finds_tiles = few_rows and not problem.dots and not needs_schedule
    if kernel == PINGPONG and problem.gather:
        # That kernel does not gather. For a long product it gains more than the copy costs.
        copied = copied._replace(x=True)
    gathers = problem.gather and not copied.x
    if finds_tiles:
        # It zeros the rows of no expert as one piece of memory, so they are not padded to sectors.
        operands = operands._replace(y=operands.y and _has_whole_rows(problem))
    # The parts in which a tile is stored. With a gate, the output is half as wide as the tile.
    stored = (
        tile[1] // (2 if problem.epilogue == "gated_activation" else 1) // config.epilogue_subtile
    )
    is_narrow = stored * problem.itemsize < 16
    tma, unmet = _described(problem, operands, device, wants, gathers, is_narrow)
    if source != "given" or kernel != PERSISTENT:
        # Nobody asked for these descriptors: rules ask for them wherever they might apply.
        unmet = ()
    if source == "given" and kernel == PERSISTENT and config.flatten and problem.bias:
        unmet = (*unmet, f"{_FLATTEN}: beside a bias Triton would load nothing ahead in one loop")
    if config.launch_pdl and problem.kind == "backward_dW":
        unmet = (*unmet, "launch_pdl: it applies to forward and dX")
    elif config.launch_pdl and not device.has_tma:
        unmet = (
            *unmet,
            f"launch_pdl: it needs compute capability 9.0 or newer, and {_name(device)}",
        )
    if obstacle is not None:
        unmet = (f"warp_specialize: {obstacle}", *unmet)
    if kernel == PERSISTENT:
        options = _persistent_options(problem, config, device, tile, tma, gathers, finds_tiles)
    else:
        options = _specialized_options(problem, config, tile, kernel)
    return Plan(
        kernel, config, source, tile, tma,
        computes_epilogue=problem.has_activation
        or (kernel == PINGPONG and problem.epilogue == "gated_activation_backward"),
        copied=copied,
        finds_tiles=finds_tiles,
        tail_tiles=getattr(config, "tail_tiles", False),
        options=options, reason=reason, unmet=unmet,
    )  # fmt: skip


def _tile_and_wishes(
    problem: Problem, config: KernelConfig
) -> tuple[tuple[int, int, int], dict[str, bool]]:
    """Return the tile in the kernel's letters, and the descriptors that the configuration wants.

    The descriptors are keyed by the configuration's field names, in the order of Operands.
    """
    rows, columns, contracted = config.tile
    if isinstance(config, KernelConfigBackward_dW):
        left = {"use_tma_load_dy": config.use_tma_load_dy}
        right = {"use_tma_load_x": config.use_tma_load_x}
        if problem.transposed:
            # dW is stored as (D, N), so its sides change places.
            rows, columns, left, right = columns, rows, right, left
    elif isinstance(config, KernelConfigForward):
        left = {"use_tma_load_x": config.use_tma_load_x}
        right = {"use_tma_load_w": config.use_tma_load_w}
    else:
        assert isinstance(config, KernelConfigBackward_dX)
        left = {"use_tma_load_dy": config.use_tma_load_dy}
        right = {"use_tma_load_w": config.use_tma_load_w}
    return (rows, columns, contracted), {
        **left, **right, "use_tma_store": config.use_tma_store,
    }  # fmt: skip


def _obstacle(
    problem: Problem, operands: Operands, device: Device, tile: tuple[int, int]
) -> str | None:
    """Return why no warp-specialised kernel can serve with such tiles, or None if one can."""
    if device.capability[0] != HOPPER:
        return f"warp-specialised kernels need Hopper (compute capability 9.x), and {_name(device)}"
    if device.is_interpreted:
        return "warp-specialised kernels do not run in Triton's interpreter"
    if problem.dtype not in {"bfloat16", "float16"}:
        return f"warp-specialised kernels take bfloat16 and float16, and this is {problem.dtype}"
    if (reason := why_not_specialized(problem, tile)) is not None:
        return reason
    for name, is_described in operands._asdict().items():
        if not is_described:
            return f"TMA cannot describe {_OPERANDS[name]}: {_RULE}"
    return why_no_kernels()


_FLATTEN = "flatten, ignored"
_OPERANDS = {"x": "the left operand", "b": "the right operand", "y": "the output"}
_RULE = "its address and strides must be multiples of 16 bytes"


def _name(device: Device) -> str:
    major, minor = device.capability
    return f"{device.name} has {major}.{minor}"


def _described(
    problem: Problem,
    operands: Operands,
    device: Device,
    wants: dict[str, bool],
    gathers: bool,
    is_narrow: bool,
) -> tuple[Operands, tuple[str, ...]]:
    """Return which operands go through descriptors, and why others that should do not.

    `is_narrow` says that parts of a tile are stored that are too narrow for a descriptor.
    """
    uses, unmet = [], []
    obstacles = {
        "x": "gathered rows are loaded by pointers" if gathers else None,
        "b": None,
        "y": "scattered rows are stored by pointers"
        if problem.scatter
        else "the parts of a tile are narrower than 16 bytes"
        if is_narrow
        else None,
    }
    for (operand, is_described), (wish, is_wanted) in zip(
        operands._asdict().items(), wants.items(), strict=True
    ):
        obstacle = obstacles[operand]
        if not device.has_tma:
            obstacle = f"it needs compute capability 9.0 or newer, and {_name(device)}"
        elif obstacle is None and not is_described:
            obstacle = f"TMA cannot describe {_OPERANDS[operand]}: {_RULE}"
        uses.append(is_wanted and obstacle is None)
        if is_wanted and obstacle is not None:
            unmet.append(f"{wish}: {obstacle}")
    return Operands(*uses), tuple(unmet)


def _has_whole_rows(problem: Problem) -> bool:
    """Return whether rows of a contiguous output of forward or dX are multiples of 16 bytes."""
    width = problem.out_features if problem.kind == "forward" else problem.in_features
    return width * problem.itemsize % 16 == 0


def _persistent_options(
    problem: Problem,
    config: KernelConfig,
    device: Device,
    tile: tuple[int, int, int],
    tma: Operands,
    gathers: bool,
    finds_tiles: bool,
) -> dict[str, Any]:
    flatten = is_flattened(config, problem)
    common = {
        "FLATTEN": flatten, "SUBTILE": config.epilogue_subtile,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if problem.kind == "backward_dW":
        return {
            "BLOCK_N": tile[0], "BLOCK_D": tile[1], "BLOCK_M": tile[2], "GROUP": config.group_m,
            "TMA_G": tma.x, "TMA_X": tma.b, "TMA_DW": tma.y,
            # Triton flattens this loop only where it can, so it is asked as it stands.
            **common, "FLATTEN": config.flatten,
        }  # fmt: skip
    follows = config.launch_pdl and device.has_dependent_launch
    return {
        "BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2], "GROUP_M": config.group_m,
        "BLOCK_W": BLOCK_W, **common, "PDL": follows, **({"launch_pdl": True} if follows else {}),
        "TMA_X": tma.x, "TMA_B": tma.b, "B_IS_NK": (problem.kind == "forward") != problem.transposed,
        "EVEN_K": problem.contracted % tile[2] == 0, "GATHER_X": gathers,
        "FINDS_TILES": finds_tiles,
        "EXPERTS": next_power_of_2(problem.num_experts) if finds_tiles else 1,
    }  # fmt: skip


def _specialized_options(
    problem: Problem, config: KernelConfig, tile: tuple[int, int, int], kernel: str
) -> dict[str, Any]:
    # Triton's num_warps counts the warps of one group. Gluon starts the others beside it.
    options = {"STAGES": config.num_stages, "num_warps": config.num_warps // 2}
    if problem.kind == "backward_dW":
        options |= {"BLOCK_N": tile[0], "BLOCK_D": tile[1], "BLOCK_M": tile[2]}
        options["GROUP_N"] = config.group_m
    else:
        options |= {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2]}
        options["GROUP_M"] = config.group_m
        if not problem.has_activation:
            options["B_IS_NK"] = (problem.kind == "forward") != problem.transposed
    if kernel == PINGPONG and problem.epilogue != "gated_activation_backward":
        options["SUBTILE"] = config.epilogue_subtile
    return options
