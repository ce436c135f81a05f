# SPDX-License-Identifier: Apache-2.0
"""Compute a configuration by rules, without tuning.

m rows, n columns and k contracted elements of one expert's product. In dW m counts the contracted
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moe_ops.configs.device import HOPPER, Device
from moe_ops.configs.footprint import fitting
from moe_ops.configs.kernel_config import (
    PINGPONG_TILE,
    TALL_TILE,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.problem import (
    FEW_ROWS,
    MORE_ROWS,
    SOME_ROWS,
    TALL_ROWS,
    Operands,
    Problem,
    copies,
    dense_operands,
    is_vector,
)
from moe_ops.configs.specialize import why_not_specialized

# A side of a weight up to this size counts as a LoRA's rank.
_NARROW = 64
# A tile of the cooperative kernels.
_WIDE_TILE = (128, 256)
# Over a contraction longer than this the products of a tile take far longer than its epilogue, and
# over one up to the other about as long.
_LONG = 2048
_SHORT = 768
# Over a contraction shorter than this, storing a tall tile costs what it saves in reading.
_TALL_LEAST = 1536
# Columns of an up projection from which it gains more from a kernel for Hopper than it costs to copy
# the rows into expert order first, if its contraction is short, and if it is longer. The copy takes
# about 1/10 of the product's time with 2,048 columns, and less with more.
_COPIES_PAY_EARLY, _COPIES_PAY = 2560, 6144
# Row tiles that share a weight's columns. Tuned ones are 4, 8 or 16, within 2% of each other.
_GROUP_M = 8
_OF_FP32 = "a tile for fp32"
_OF_OLD_GPUS = "a tile for GPUs before compute capability 8.0"
_BY_POINTERS = "pointers load or store, since TMA cannot describe all operands"
_WITHOUT_TMA = "pointers load and store: this GPU has no TMA"


def heuristic(problem: Problem, device: Device, operands: Operands | None = None) -> KernelConfig:
    """Return a configuration by rules; it compiles and fits the GPU's shared memory.

    Args:
        problem: the product.
        device: the GPU.
        operands: which of its tensors TMA can describe; None: all are dense and aligned.
    """
    return heuristic_and_reason(problem, device, operands)[0]


def heuristic_and_reason(
    problem: Problem, device: Device, operands: Operands | None = None
) -> tuple[KernelConfig, str]:
    """Return the same, and why."""
    if operands is None:
        operands = dense_operands(problem)
    if not device.has_tma:
        operands = Operands(False, False, False)
    is_dw = problem.kind == "backward_dW"
    rule = _heuristic_dw if is_dw else _heuristic_gemm
    config, why = rule(problem, device, operands)
    narrow = _narrowed(config, problem)
    if narrow is not config:
        why = f"a side of the weight has at most {_NARROW} elements: reading or writing the rows is the bound"
    fitted = fitting(narrow, problem, device)
    if fitted.tile != narrow.tile:
        tile = "x".join(map(str, narrow.tile))
        why = f"a tile of {tile} does not fit the shared memory, so this one is smaller ({why})"
    return fitted, why


def _narrowed(config: KernelConfig, problem: Problem) -> KernelConfig:
    """Return the configuration with blocks no wider than a LoRA's rank, if the weight has one.

    Such a product is bound by reading or writing its matrix of rows. Two programs per SM keep that
    going.
    """
    sides = {"BLOCK_N": problem.out_features, "BLOCK_K": problem.in_features}
    narrow: dict[str, Any] = {
        name: max(16, 1 << (side - 1).bit_length())
        for name, side in sides.items()
        if side <= _NARROW and problem.rows > FEW_ROWS
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


@dataclass(frozen=True)
class _Tile:
    """Hold a tile of m by n, contracted k at a time, and how a program computes it.

    Attributes:
        m, n, k, warps, stages: as in KernelConfig, in the letters of this module.
        why: why this tile.
        subtile: in how many parts a tile is stored.
        programs_per_sm: programs launched per streaming multiprocessor.
        loads: whether descriptors load both operands.
        loads_weight: whether a descriptor loads the weight alone.
        stores: whether a descriptor stores.
        is_specialized: whether a kernel for Hopper is asked for.
        flatten: whether one loop of two is made, if descriptors load.
        follows: whether the kernel begins while the one before it ends, where the GPU can.
        group_m: row tiles that share a weight's columns.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int = 3
    subtile: int = 1
    programs_per_sm: int = 1
    loads: bool = False
    loads_weight: bool = False
    stores: bool = False
    is_specialized: bool = False
    flatten: bool = True
    follows: bool = False
    group_m: int = _GROUP_M
    why: str = ""


def _heuristic_gemm(
    problem: Problem, device: Device, operands: Operands
) -> tuple[KernelConfig, str]:
    """Return a configuration of forward or dX, with m, n, k as the tile of their one kernel."""
    tile = _gemm_tile(problem, device, operands)
    common: dict[str, Any] = {
        "BLOCK_M": tile.m, "num_warps": tile.warps, "num_stages": tile.stages,
        "group_m": tile.group_m, "programs_per_sm": tile.programs_per_sm,
        "use_tma_store": tile.stores, "use_tma_load_w": tile.loads or tile.loads_weight,
        "epilogue_subtile": tile.subtile,
        # In a flattened loop the dots spill on Blackwell.
        "flatten": tile.flatten and tile.loads and not problem.bias
        and not (problem.dots and device.capability >= (10, 0)),
        "warp_specialize": tile.is_specialized,
        "launch_pdl": tile.follows and device.has_tma,
    }  # fmt: skip
    config: KernelConfig
    if problem.kind == "forward":
        config = KernelConfigForward(
            BLOCK_N=tile.n, BLOCK_K=tile.k, use_tma_load_x=tile.loads, **common
        )
    else:
        config = KernelConfigBackward_dX(
            BLOCK_K=tile.n, BLOCK_N=tile.k, use_tma_load_dy=tile.loads, **common
        )
    return config, tile.why


def _gemm_tile(problem: Problem, device: Device, operands: Operands) -> _Tile:
    if problem.dtype == "float32":
        return _Tile(64, 64, 32, 4, why=_OF_FP32)
    if device.capability < (8, 0):
        return _Tile(64, 64, 16, 8, why=_OF_OLD_GPUS)
    if problem.rows <= FEW_ROWS:
        return _few_rows_tile(problem, device, operands)
    loads = operands.x and operands.b
    is_even = is_vector(problem.out_features) and is_vector(problem.in_features)
    if loads:
        tile = _tma_tile(problem, device, operands)
        if operands.y:
            return tile
        # Pointers store number by number. The addresses take the registers of a wider tile.
        tile = replace(
            tile, warps=8, subtile=2, programs_per_sm=1, stores=False,
            why="pointers store, since TMA cannot describe the output: their addresses take registers",
        )  # fmt: skip
        if not problem.has_activation:
            # A flattened loop keeps the addresses.
            return replace(tile, n=min(tile.n, 128), flatten=False)
        # Beside a bias, or two outputs as wide as the tile, less is left.
        has_little = problem.bias or problem.epilogue == "activation"
        return replace(tile, n=64 if has_little else min(tile.n, 128))
    why = _BY_POINTERS if device.has_tma else _WITHOUT_TMA
    return _Tile(128, 128 if is_even else 64, 32, 8, why=why)


def _few_rows_tile(problem: Problem, device: Device, operands: Operands) -> _Tile:
    """Return a tile for decoding: an expert has few rows, and reading the weights is the bound.

    Descriptors gain nothing there and cost host time, unless pointers read number by number.
    """
    by_descriptor = operands.b and not is_vector(problem.weight_row)
    why = f"an expert has at most {FEW_ROWS} rows: reading its weight is the bound, and a low tile wastes little"
    if problem.rows <= 8:
        return _Tile(
            16, 64, 128, 4,
            programs_per_sm=4, loads_weight=by_descriptor, follows=True, why=why,
        )  # fmt: skip
    along = (problem.kind == "forward") != problem.transposed
    if along and not (by_descriptor or is_vector(problem.weight_row)):
        # The contraction runs along the weight's rows: the addresses of a deeper step, one for each
        # number, spill.
        return _Tile(
            32, 128, 32, 8, programs_per_sm=2,
            why=f"{why}; pointers read number by number, and their addresses take registers",
        )  # fmt: skip
    # With fewer steps loaded ahead an SM has room for both programs.
    stages = 2 if device.shared_memory < 160 * 1024 else 3
    return _Tile(32, 128, 128, 4, stages, programs_per_sm=2, loads_weight=by_descriptor, why=why)


def _tma_tile(problem: Problem, device: Device, operands: Operands) -> _Tile:
    """Return a tile for 16-bit operands that descriptors load."""
    # With an activation on top there are registers to finish half a tile at a time.
    subtile = 2 if problem.has_activation else 1
    is_copied = copies(problem, device, operands).x
    if problem.dots:
        # The rows whose dots with x @ b are taken need the registers of a wider tile.
        why = "the router gradient's rows take the registers of a wider tile"
        if is_vector(problem.out_features) and is_vector(problem.in_features):
            return _Tile(128, 128, 64, 8, 4, subtile, loads=True, why=why)
        # Read number by number, those rows need more. A flattened loop keeps their addresses too.
        return _Tile(128, 64, 64, 8, 4, subtile, loads=True, flatten=False, why=why)
    if problem.rows <= MORE_ROWS:
        why = f"an expert has at most {MORE_ROWS} rows: a higher tile would compute padding"
        return _Tile(64, 256, 64, 4, 4, subtile, loads=True, stores=True, why=why)
    is_hopper = device.capability[0] == HOPPER
    # The kernels for Hopper take rows in expert order: those of an activation are copied first.
    is_ordered = not problem.has_activation or problem.bias or is_copied or _copy_pays(problem)
    # Only the persistent kernel computes an activation in a wide tile, which such rows need.
    needs_wide = problem.epilogue == "gated_activation" and _splits_sectors(problem)
    serves = all(operands) and why_not_specialized(problem, PINGPONG_TILE) is None
    if is_hopper and is_ordered and serves and (problem.bias or not needs_wide):
        return _specialized_tile(problem)
    if problem.has_activation and (
        problem.epilogue == "activation" or problem.bias or device.capability >= (10, 0)
    ):
        what = "the activation and of a bias" if problem.bias else "the activation"
        why = f"the registers of {what} leave room for half of the widest tile"
        return _Tile(128, 128, 64, 8, 4, subtile, loads=True, stores=True, why=why)
    is_bare_gather = problem.gather and not problem.has_activation and not is_copied
    if is_hopper and problem.kind == "forward" and is_bare_gather and problem.rows > SOME_ROWS:
        # Not for an expert of few rows: it is bound by reading its weight, and narrower tiles read
        # that more often. Not for dX: there the wide tile is faster.
        why = "of two programs on an SM one gathers its rows or stores while the other multiplies"
        return _Tile(
            128, 128, 64, 4, subtile=2, programs_per_sm=2, loads=True, stores=True, why=why
        )
    why = "the widest tile reads least for each product"
    obstacle = why_not_specialized(problem, PINGPONG_TILE)
    if is_hopper and obstacle is not None:
        why += f"; {obstacle}"
    elif is_hopper and not is_ordered:
        why += ", and copying the rows for a warp-specialised kernel would cost more than it gains"
    elif is_hopper and needs_wide:
        why += ": rows begin within sectors of 32 bytes, which each narrow tile would read again"
    return _Tile(128, 256, 64, 8, subtile=subtile, loads=True, stores=True, why=why)


def _copy_pays(problem: Problem) -> bool:
    """Return whether an up projection without a bias gains from rows that are copied first.

    Experts of few rows do not: they are bound by reading their weights, and the tiles of the
    kernel for Hopper are narrower than those of the persistent one. For the same reason a long
    contraction does not, whose epilogue is not worth hiding.
    """
    if problem.rows <= SOME_ROWS or problem.contracted > _LONG:
        return False
    least = _COPIES_PAY_EARLY if problem.contracted <= _SHORT else _COPIES_PAY
    return problem.out_features >= least


def _specialized_tile(problem: Problem) -> _Tile:
    """Return the tile of a kernel for Hopper: ping-pong, or cooperative where reading is the bound.

    In ping-pong one group of warps multiplies while the other ends its tile. A cooperative tile is
    twice as wide, so each operand that is read serves more products. A tall one reads the weight of
    an expert of few rows once.
    """
    if not problem.has_activation and why_not_specialized(problem, _WIDE_TILE) is None:
        # The activation's backward is computed on top in ping-pong alone. In a wide tile the product
        # is a bare one, and a second kernel reads it.
        if _is_bound_by_reading(problem):
            # The deeper a step, the smaller the share of sectors that are read for a part.
            return _Tile(
                *_WIDE_TILE, 64, 8, loads=True, stores=True, is_specialized=True,
                why="reading the operands is the bound, and a wide tile reads less",
            )  # fmt: skip
        is_tall = problem.rows <= TALL_ROWS and problem.contracted >= _TALL_LEAST
        if is_tall and not _pads(problem):
            return _Tile(
                *TALL_TILE, 64, 8, loads=True, stores=True, is_specialized=True, group_m=1,
                why="most experts have one tile of up to 192 rows, so their weights are read once",
            )  # fmt: skip
        if problem.rows <= SOME_ROWS and problem.contracted > _LONG:
            depth, stages = (32, 6) if _fills_steps(problem) else (64, 3)
            return _Tile(
                *_WIDE_TILE, depth, 8, stages, loads=True, stores=True, is_specialized=True,
                why=f"an expert has at most {SOME_ROWS} rows: a wide tile reads its weight less often",
            )  # fmt: skip
    # Smaller buffers for the stores leave room for more stages. With the activation's backward they
    # hold fewer columns at a time, which costs more than the stages gain.
    stages, subtile = (4, 1) if problem.epilogue == "gated_activation_backward" else (6, 2)
    return _Tile(
        *PINGPONG_TILE, 64, 8, stages, subtile, loads=True, stores=True, is_specialized=True,
        why="one group of warps multiplies while the other ends its tile",
    )  # fmt: skip


def _is_bound_by_reading(problem: Problem) -> bool:
    """Return whether reading the operands bounds a narrow tile of forward or dX.

    It does if rows of x begin within sectors, since they are read again for each column of tiles. It
    also does if the weight's rows begin so, or if a long contraction has a narrow result, unless a
    wide tile pads the result by a tenth more. With the activation's backward on top, the rows of the
    pre-activation decide.
    """
    contracted, columns = problem.contracted, _columns(problem)
    if problem.epilogue == "gated_activation_backward":
        return not is_vector(columns)
    if not is_vector(contracted):
        return True
    is_narrow = contracted > max(_LONG, 8 * columns)
    return (is_narrow or not is_vector(problem.weight_row)) and not _pads(problem)


def _columns(problem: Problem) -> int:
    """Return how many columns the result of forward or dX has."""
    return problem.in_features + problem.out_features - problem.contracted


def _pads(problem: Problem) -> bool:
    """Return whether wide tiles pad the result of forward or dX by a tenth more than others."""
    columns = _columns(problem)
    return _padded(columns, _WIDE_TILE[1]) > 1.1 * _padded(columns, PINGPONG_TILE[1])


def _fills_steps(problem: Problem) -> bool:
    """Return whether rows of both operands begin at multiples of 32 elements, or 64 bytes.

    Else steps of 32 elements read most of their lines twice.
    """
    return problem.contracted % 32 == 0 and problem.weight_row % 32 == 0


def _splits_sectors(problem: Problem) -> bool:
    """Return whether rows of a 16-bit operand of forward or dX begin within sectors of 32 bytes.

    Each 128 bytes of such a row are read as five sectors in place of four. The L2 cache then bounds
    a narrow tile, which reads more for each product.
    """
    return not (is_vector(problem.contracted) and is_vector(problem.weight_row))


def _heuristic_dw(problem: Problem, device: Device, operands: Operands) -> tuple[KernelConfig, str]:
    if problem.dtype == "float32" or device.capability < (8, 0):
        is_fp32 = problem.dtype == "float32"
        return KernelConfigBackward_dW(
            BLOCK_M=32 if is_fp32 else 16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3,
            flatten=False,
        ), _OF_FP32 if is_fp32 else _OF_OLD_GPUS  # fmt: skip
    if not all(operands):
        dy, x = reversed(operands[:2]) if problem.transposed else operands[:2]
        # Descriptors load deeper steps, and more of them, beside pointers that store.
        depth, stages = (64, 4) if dy and x else (32, 3)
        return KernelConfigBackward_dW(
            BLOCK_M=depth, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=stages, flatten=False,
            use_tma_load_dy=dy, use_tma_load_x=x, use_tma_store=operands.y,
        ), _BY_POINTERS if device.has_tma else _WITHOUT_TMA  # fmt: skip
    if device.capability[0] == HOPPER and min(problem.out_features, problem.in_features) >= 128:
        n, k = _wide_dw_tile(problem)
        return KernelConfigBackward_dW(
            BLOCK_M=32, BLOCK_N=n, BLOCK_K=k, num_warps=8, num_stages=6, group_m=4,
            use_tma_load_dy=True, use_tma_load_x=True, use_tma_store=True, warp_specialize=True,
        ), f"a side of 256 reads less than a square tile, and {n}x{k} pads or reads no more than {k}x{n}"  # fmt: skip
    return KernelConfigBackward_dW(
        BLOCK_M=32, BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=4, group_m=4,
        programs_per_sm=2, use_tma_load_dy=True, use_tma_load_x=True, use_tma_store=True,
        epilogue_subtile=2,
    ), "where an SM has room for two programs, one stores its tile while the other multiplies"  # fmt: skip


def _wide_dw_tile(problem: Problem) -> tuple[int, int]:
    """Return the tile of dW with a side of 256: the one that pads less, else that reads less.

    A row of an operand is read again for each tile along the other side. So where one operand's rows
    begin within sectors, the tile is wide along the other one's.
    """

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        sides = (problem.out_features, tile[0]), (problem.in_features, tile[1])
        area = math.prod(_padded(size, side) for size, side in sides)
        # Five sectors in place of four.
        return area, sum(side * (4 if is_vector(size) else 5) for size, side in sides)

    n, k = _WIDE_TILE
    return min((n, k), (k, n), key=cost)


def _padded(size: int, side: int) -> int:
    """Return a size, rounded up to whole tiles of this side."""
    return -(-size // side) * side
