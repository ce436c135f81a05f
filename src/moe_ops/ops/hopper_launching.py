# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of kernels/hopper.py, where they can serve.

That is on Hopper, with 16-bit operands and an output that descriptors describe. Elsewhere each
function returns False, having done nothing, and its caller launches the kernel for every GPU.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch

from moe_ops.configs.choose import HOPPER, device_of
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.ops.launching import launch_on
from moe_ops.ops.tma_launching import describe_for_gluon

logger = logging.getLogger("moe_ops")


def grouped_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    tiles: torch.Tensor,
    max_tiles: int,
    programs: int,
    blocks: tuple[int, int, int],
    config: KernelConfig,
) -> bool:
    """Writes y[row] = x[row] @ b[e], b (E, K, N), by a tile schedule; tells whether it did.

    The blocks are (BLOCK_M, BLOCK_N, BLOCK_K) in the letters of x, b and y.
    """
    block_m, block_n, block_k = blocks
    group_rows = block_m // 2
    b_is_nk = b.stride(1) == 1
    stored_b = b.transpose(1, 2) if b_is_nk else b
    b_block = (1, block_n, block_k) if b_is_nk else (1, block_k, block_n)
    kernels = _kernels_for(x)
    x_desc = describe_for_gluon(x, (group_rows, block_k))
    b_desc = describe_for_gluon(stored_b, b_block)
    y_desc = describe_for_gluon(y, (group_rows, block_n), ragged=True)
    if kernels is None or x_desc is None or b_desc is None or y_desc is None:
        return False
    with launch_on(x):
        kernels.grouped_gemm_hopper_kernel[(programs,)](
            x_desc, b_desc, y_desc, tiles, max_tiles, b.shape[2], b.shape[1],
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, B_IS_NK=b_is_nk,
            GROUP_M=config.group_m, **_options(config),
        )  # fmt: skip
    return True


def expert_up(
    x: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor | None,
    h: torch.Tensor | None,
    tiles: torch.Tensor,
    max_tiles: int,
    programs: int,
    blocks: tuple[int, int, int],
    config: KernelConfig,
    activation: str,
    limit: float | None,
) -> bool:
    """Writes z[row] = x[row] @ b[e] and h[row] = act(gate) * up, b (E, K, 2 * width); tells whether.

    The blocks are as in grouped_gemm; gate and up are the halves of z.
    """
    block_m, block_n, block_k = blocks
    group_rows, block_i, width = block_m // 2, block_n // 2, b.shape[2] // 2
    kernels = _kernels_for(x)
    x_desc = describe_for_gluon(x, (group_rows, block_k))
    b_halves = b.transpose(1, 2).unflatten(1, (2, width))
    b_desc = describe_for_gluon(b_halves, (1, 2, block_i, block_k))
    stored = [
        None
        if rows is None
        else describe_for_gluon(
            rows.unflatten(1, (-1, width)), (group_rows, 1, block_i), ragged=True
        )
        for rows in (z, h)
    ]
    z_desc, h_desc = stored[0] or stored[1], stored[1] or stored[0]
    lacks = (z is not None and stored[0] is None) or (h is not None and stored[1] is None)
    if kernels is None or x_desc is None or b_desc is None or lacks:
        return False
    with launch_on(x):
        kernels.expert_up_hopper_kernel[(programs,)](
            x_desc, b_desc, z_desc, h_desc, tiles, max_tiles, width, b.shape[1], limit or 0.0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            GROUP_M=config.group_m, ACTIVATION=activation, HAS_LIMIT=limit is not None,
            STORE_Z=z is not None, STORE_H=h is not None, **_options(config),
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
    block_m, block_left, block_right = blocks
    group_rows = block_left // 2
    kernels = _kernels_for(left)
    left_desc = describe_for_gluon(left, (block_m, group_rows), ragged=True)
    right_desc = describe_for_gluon(right, (block_m, block_right), ragged=True)
    desc = describe_for_gluon(stored, (1, group_rows, block_right))
    if kernels is None or left_desc is None or right_desc is None or desc is None:
        return False
    with launch_on(left):
        kernels.grouped_gemm_bwd_dw_hopper_kernel[(programs,)](
            left_desc, right_desc, desc, offsets, *stored.shape,
            BLOCK_M=block_m, BLOCK_N=block_left, BLOCK_D=block_right,
            GROUP_N=config.group_m, **_options(config),
        )  # fmt: skip
    return True


def _options(config: KernelConfig) -> dict[str, Any]:
    # Triton's num_warps are those of one group; Gluon starts the others beside it.
    return {"STAGES": config.num_stages, "num_warps": config.num_warps // 2}


def _kernels_for(operand: torch.Tensor) -> ModuleType | None:
    """kernels/hopper.py, where it can multiply such operands."""
    is_served = device_of(operand.device).capability[0] == HOPPER and operand.itemsize == 2
    return _import_kernels() if is_served else None


@functools.cache
def _import_kernels() -> ModuleType | None:
    # Gluon is experimental: a Triton to come may have moved what these kernels are made of.
    try:
        from moe_ops.kernels import hopper
    except (ImportError, AttributeError) as error:
        logger.warning("moe_ops: the kernels for Hopper are not used with this Triton: %s", error)
        return None
    return hopper
