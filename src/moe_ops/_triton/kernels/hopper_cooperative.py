# SPDX-License-Identifier: Apache-2.0
"""Compute grouped GEMMs on Hopper with cooperative groups of warps, in Gluon.

One warp loads, two groups of four warps multiply and store. Both groups share a tile, and each has
half of its rows. The products and the letters are those of grouped_gemm.py and grouped_gemm_dw.py.
The operands have 16 bits and come through descriptors.

The loading warp runs ahead through the ring of STAGES buffers (hopper_ring.py), from one tile into
the next. While one group stores, the other multiplies, and the next tile's operands are loading.
Triton would pipeline the loads in the groups' own loop. Then each tile would begin by waiting for
its first operands, and end with nothing to multiply.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from moe_ops._triton.kernels.hopper_ring import (
    GROUPS,
    RAGGED_END,
    WORKER_REGISTERS,
    WORKER_WARPS,
    begin_product,
    dw_tile,
    end_product,
    load_dw_operands,
    load_operands,
    new_ring,
    scheduled_tile,
    store_tile,
)


@gluon.jit
def _gemm_multiply(
    y_desc, ys, ring, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one group's rows of each tile of y."""
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K = ring
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    num_steps = gl.cdiv(K, BLOCK_K)
    step = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        _, first, end, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        y = begin_product(
            xs, bs, full, empty, step, num_steps,
            GROUP, GROUPS, False, B_IS_NK, ROWS, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        y, step = end_product(y, empty, step, num_steps, STAGES)
        row = RAGGED_END - (end - first) + GROUP * ROWS
        store_tile(y_desc, ys.index(GROUP), y, [RAGGED_END, end, row, tile_n * BLOCK_N], 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def grouped_gemm_cooperative_kernel(
    x_desc, b_desc, y_desc, tiles_ptr, max_tiles, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute y[row] = x[row] @ b[e], rows in expert order: grouped_gemm_kernel's bare product.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... Needs the schedule,
    and writes the rows of its tiles only.
    """
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    B_SHAPE: gl.constexpr = [1, BLOCK_N, BLOCK_K] if B_IS_NK else [1, BLOCK_K, BLOCK_N]
    tiles_n = gl.cdiv(N, BLOCK_N)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUPS, ROWS, BLOCK_K], x_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SHAPE, b_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 1, 1, ROWS, BLOCK_N], y_desc.layout)
    full, empty = new_ring(STAGES, GROUPS)
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (
                _gemm_multiply,
                (y_desc, ys, ring, 0, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES),
            ),
            (
                _gemm_multiply,
                (y_desc, ys, ring, 1, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES),
            ),
            (
                load_operands,
                (
                    x_desc,
                    b_desc,
                    ring,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    B_IS_NK,
                    STAGES,
                    GROUPS,
                    False,
                ),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


@gluon.jit
def _dw_multiply(
    dw_desc, dws, ring, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one group's rows of each tile of dw."""
    ROWS: gl.constexpr = BLOCK_N // GROUPS
    gs, xs, full, empty, offsets_ptr, num_experts, tiles_n, tiles_d = ring
    step = 0
    for t in range(gl.program_id(0), num_experts * tiles_n * tiles_d, gl.num_programs(0)):
        e, start, end, n0, d0 = dw_tile(
            t, offsets_ptr, num_experts, tiles_n, tiles_d, BLOCK_N, BLOCK_D, GROUP_N
        )
        num_steps = gl.cdiv(end - start, BLOCK_M)
        dw = begin_product(
            gs, xs, full, empty, step, num_steps,
            GROUP, GROUPS, True, False, ROWS, BLOCK_D, BLOCK_M, STAGES,
        )  # fmt: skip
        dw, step = end_product(dw, empty, step, num_steps, STAGES)
        store_tile(dw_desc, dws.index(GROUP), dw, [e, n0 + GROUP * ROWS, d0], 0)
    tma.store_wait(0)


@gluon.jit
def grouped_gemm_bwd_dw_cooperative_kernel(
    g_desc, x_desc, dw_desc, offsets_ptr, num_experts, N, D,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute dw[e] (N, D) = sum over the rows m of expert e of outer(g[m], x[m]).

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... Needs nothing
    initialised and writes all of dw, zeros for an expert without rows. The hardware loads rows past
    an expert's end as zeros.
    """
    ROWS: gl.constexpr = BLOCK_N // GROUPS
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles_d = gl.cdiv(D, BLOCK_D)
    gs = gl.allocate_shared_memory(
        g_desc.dtype, [STAGES * GROUPS, 1, 1, BLOCK_M, ROWS], g_desc.layout
    )
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], x_desc.layout)
    dws = gl.allocate_shared_memory(dw_desc.dtype, [GROUPS, 1, ROWS, BLOCK_D], dw_desc.layout)
    full, empty = new_ring(STAGES, GROUPS)
    ring = (gs, xs, full, empty, offsets_ptr, num_experts, tiles_n, tiles_d)
    gl.warp_specialize(
        [
            (_dw_multiply, (dw_desc, dws, ring, 0, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES)),
            (_dw_multiply, (dw_desc, dws, ring, 1, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES)),
            (
                load_dw_operands,
                (g_desc, x_desc, ring, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES, GROUPS),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )
