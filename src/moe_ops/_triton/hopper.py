# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of kernels/hopper*.py, where they can serve.

That is on Hopper, with 16-bit operands and an output that descriptors describe. Elsewhere each
function returns False, having launched nothing, and its caller launches the kernel for every GPU.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from moe_ops._triton.descriptors import describe_for_gluon
from moe_ops._triton.launch import Activation, launch_on, strides
from moe_ops._triton.rows import copy_rows
from moe_ops.configs.device import HOPPER, device_of
from moe_ops.configs.footprint import epilogue_columns, epilogue_slots
from moe_ops.configs.kernel_config import KernelConfig

logger = logging.getLogger("moe_ops")


@dataclass(frozen=True)
class ScheduledTiles:
    """The tiles of a grouped GEMM, as _triton/kernels/schedule.py makes them, and how they are computed.

    Attributes:
        tiles, max_tiles: the schedule.
        programs: how many share the tiles.
        blocks: BLOCK_M, BLOCK_N and BLOCK_K, in the letters of _triton/kernels/grouped_gemm.py.
        config: whose blocks they are, in the letters of its pass.
    """

    tiles: torch.Tensor
    max_tiles: int
    programs: int
    blocks: tuple[int, int, int]
    config: KernelConfig

    @property
    def options(self) -> dict[str, Any]:
        """The constexpr arguments that all kernels of such tiles have, and Triton's own."""
        block_m, block_n, block_k = self.blocks
        return {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "GROUP_M": self.config.group_m, **_options(self.config),
        }  # fmt: skip


def serves(operand: torch.Tensor) -> bool:
    """Whether the kernels can multiply such operands, if descriptors describe them."""
    is_hopper = device_of(operand.device).capability[0] == HOPPER
    return is_hopper and operand.itemsize == 2 and _import_kernels() is not None


def has_down_backward(operand: torch.Tensor, activation: Activation) -> bool:
    """Whether expert_down_backward has a kernel for that, if descriptors describe the operands."""
    # The error function of "gelu" takes registers that the kernel lacks.
    return serves(operand) and activation.name != "gelu"


def grouped_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    scheduled: ScheduledTiles,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    gather: torch.Tensor | None = None,
    top_k: int = 1,
    scatter_y: bool = False,
) -> bool:
    """Writes y[row] = scale * (x[row] @ b[e] + bias[e]), b (E, K, N); tells whether it did.

    scale (T, top_k) is by slot, which is gather[row], or the row itself. With scatter_y it writes
    y[slot]. Bias, scale and scatter_y are for tiles of TURNS_TILE alone.
    """
    config = scheduled.config
    in_turns = config.is_in_turns
    is_bare = bias is None and scale is None and not scatter_y
    if not serves(x) or not (in_turns or is_bare):
        return False
    block_m, block_n, block_k = scheduled.blocks
    group_rows = block_m if in_turns else block_m // 2
    x_desc = describe_for_gluon(x, (group_rows, block_k))
    b_desc = _describe_b(b, block_n, block_k)
    y_desc = describe_for_gluon(y, (group_rows, block_n // config.epilogue_subtile), ragged=True)
    if x_desc is None or b_desc is None or y_desc is None:
        return False
    # What is not read makes no other kernel.
    if scale is None:
        top_k = 1
        gather = gather if scatter_y else None
    tiles, max_tiles = scheduled.tiles, scheduled.max_tiles
    options = {"B_IS_NK": b.stride(1) == 1, **scheduled.options}
    kernels = _import_kernels()
    with launch_on(x):
        if in_turns:
            kernels.turns.grouped_gemm_hopper_turns_kernel[(scheduled.programs,)](
                x_desc, b_desc, y_desc, y, bias, scale, gather, tiles, max_tiles, x.shape[0],
                b.shape[2], b.shape[1], top_k, *strides(bias), *strides(scale),
                HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
                HAS_GATHER=gather is not None, SCATTER_Y=scatter_y,
                SUBTILE=config.epilogue_subtile, **options,
            )  # fmt: skip
        else:
            kernels.halves.grouped_gemm_hopper_kernel[(scheduled.programs,)](
                x_desc, b_desc, y_desc, tiles, max_tiles, b.shape[2], b.shape[1], **options
            )
    return True


def expert_up(
    x: torch.Tensor,
    scatter_indices: torch.Tensor,
    divisor: int,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    h: torch.Tensor | None,
    scheduled: ScheduledTiles,
    activation: Activation,
    interleaved: bool,
) -> bool:
    """Writes z[row] = x[row] @ b[e] + bias[e] and h[row] = act(gate) * up; tells whether it did.

    b is (E, K, 2 * width). The tiles are of TURNS_TILE; gate and up are the halves of z, or its even
    and odd columns. With a divisor x has the rows of tokens, which are copied to their slots' places
    first.
    """
    # Where the rows of x, or of a copy of them, are whole 16 bytes.
    is_even = b.shape[1] * x.itemsize % 16 == 0
    if not serves(x) or b.stride(1) != 1 or not is_even:
        return False
    block_m, block_n, block_k = scheduled.blocks
    subtile = scheduled.config.epilogue_subtile
    block_i, width = block_n // 2, b.shape[2] // 2
    if interleaved:
        b_desc = _describe_b(b, block_n, block_k)
    else:
        b_halves = b.transpose(1, 2).unflatten(1, (2, width))
        b_desc = describe_for_gluon(b_halves, (1, 2, block_i, block_k))
    stored = [
        None if rows is None else _describe_parts(rows, part, block_m, block_i // subtile)
        for rows, part in ((z, 2 * width if interleaved else width), (h, width))
    ]
    z_desc, h_desc = stored[0] or stored[1], stored[1] or stored[0]
    lacks = (z is not None and stored[0] is None) or (h is not None and stored[1] is None)
    if b_desc is None or lacks:
        return False
    x = copy_rows(x, scatter_indices, divisor) if divisor else x
    x_desc = describe_for_gluon(x, (block_m, block_k))
    if x_desc is None:
        return False
    with launch_on(x):
        _import_kernels().experts.expert_up_hopper_kernel[(scheduled.programs,)](
            x_desc, b_desc, bias, z_desc, h_desc, scheduled.tiles, scheduled.max_tiles, width,
            b.shape[1], activation.bound, *strides(bias), HAS_BIAS=bias is not None,
            INTERLEAVED=interleaved, STORE_Z=z is not None, STORE_H=h is not None,
            SUBTILE=subtile, **activation.options, **scheduled.options,
        )  # fmt: skip
    return True


def expert_down_backward(
    dy: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    dz: torch.Tensor,
    sh: torch.Tensor | None,
    dots: torch.Tensor | None,
    scale: torch.Tensor | None,
    gather: torch.Tensor,
    top_k: int,
    scheduled: ScheduledTiles,
    activation: Activation,
) -> bool:
    """Writes what the activation's backward makes of dh[row] = dy[row] @ b[e]; tells whether it did.

    That is dz, with gate and up apart, sh = scale * h, and dots (column tiles, R), as the kernel has
    them. The tiles are of TURNS_TILE.
    """
    if not has_down_backward(dy, activation) or not scheduled.config.is_in_turns:
        return False
    block_m, block_n, block_k = scheduled.blocks
    width = b.shape[2]
    has_limit = activation.limit is not None
    columns = epilogue_columns(scheduled.config, activation.name, has_limit)
    slots = epilogue_slots(scheduled.config, device_of(dy.device))
    dy_desc = describe_for_gluon(dy, (block_m, block_k))
    b_desc = _describe_b(b, block_n, block_k)
    z_desc, dz_desc = (_describe_parts(rows, width, block_m, columns) for rows in (z, dz))
    sh_desc = dz_desc if sh is None else _describe_parts(sh, width, block_m, columns)
    if any(desc is None for desc in (dy_desc, b_desc, z_desc, dz_desc, sh_desc)):
        return False
    with launch_on(dy):
        _import_kernels().experts.expert_down_bwd_hopper_kernel[(scheduled.programs,)](
            dy_desc, b_desc, z_desc, dz_desc, sh_desc, scale, gather, dots, scheduled.tiles,
            scheduled.max_tiles, dy.shape[0], width, b.shape[1], top_k, activation.bound,
            *strides(scale),
            B_IS_NK=b.stride(1) == 1, CHUNKS=block_n // columns, SLOTS=slots,
            HAS_SCALE=scale is not None, STORE_H=sh is not None, STORE_DOTS=dots is not None,
            **activation.options, **scheduled.options,
        )  # fmt: skip
    return True


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    stored: torch.Tensor,
    offsets: torch.Tensor,
    programs: int,
    blocks: tuple[int, int, int],
    config: KernelConfig,
) -> bool:
    """Writes stored[e] = sum_i outer(left[i], right[i]) of each expert's rows; tells whether it did.

    The blocks are the rows contracted at a step, the rows and the columns of a tile of `stored`.
    """
    if not serves(left):
        return False
    block_m, block_left, block_right = blocks
    in_turns = config.is_in_turns
    group_rows = block_left if in_turns else block_left // 2
    left_desc = describe_for_gluon(left, (block_m, group_rows), ragged=True)
    right_desc = describe_for_gluon(right, (block_m, block_right), ragged=True)
    columns = block_right // config.epilogue_subtile
    desc = describe_for_gluon(stored, (1, group_rows, columns))
    if left_desc is None or right_desc is None or desc is None:
        return False
    kernels = _import_kernels()
    kernel = kernels.halves.grouped_gemm_bwd_dw_hopper_kernel
    options = _options(config)
    if in_turns:
        kernel = kernels.turns.grouped_gemm_bwd_dw_hopper_turns_kernel
        options["SUBTILE"] = config.epilogue_subtile
    with launch_on(left):
        kernel[(programs,)](
            left_desc, right_desc, desc, offsets, *stored.shape,
            BLOCK_M=block_m, BLOCK_N=block_left, BLOCK_D=block_right,
            GROUP_N=config.group_m, **options,
        )  # fmt: skip
    return True


def _options(config: KernelConfig) -> dict[str, Any]:
    # Triton's num_warps are those of one group; Gluon starts the others beside it.
    return {"STAGES": config.num_stages, "num_warps": config.num_warps // 2}


def _describe_b(b: torch.Tensor, block_n: int, block_k: int) -> Any | None:
    """A descriptor of b (E, K, N), as it is stored: (E, N, K) where that is dense."""
    if b.stride(1) == 1:
        return describe_for_gluon(b.transpose(1, 2), (1, block_n, block_k))
    return describe_for_gluon(b, (1, block_k, block_n))


def _describe_parts(rows: torch.Tensor, width: int, block_rows: int, columns: int) -> Any | None:
    """A ragged descriptor of rows in parts of `width`: gate and up, or the one that there is."""
    parts = rows.unflatten(1, (-1, width))
    return describe_for_gluon(parts, (block_rows, 1, columns), ragged=True)


@functools.cache
def _import_kernels() -> Any:
    """The kernels' modules, _triton/kernels/hopper_cooperative.py as `halves`, `turns` and `experts`; None without Gluon."""
    # Gluon is experimental: a Triton to come may have moved what these kernels are made of.
    try:
        from moe_ops._triton.kernels import hopper_cooperative, hopper_experts, hopper_pingpong
    except (ImportError, AttributeError) as error:
        logger.warning("moe_ops: the kernels for Hopper are not used with this Triton: %s", error)
        return None
    return SimpleNamespace(halves=hopper_cooperative, turns=hopper_pingpong, experts=hopper_experts)
