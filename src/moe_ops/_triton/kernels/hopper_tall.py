# SPDX-License-Identifier: Apache-2.0
"""Compute grouped GEMMs on Hopper in tiles of up to 192 rows, in Gluon.

One warp loads, two groups of four warps multiply and store, as in hopper_cooperative.py. Here both
groups share a tile's rows, and each has half of its columns. The rows come in parts of 64. An expert
of one tile gets as many parts as it has rows for, so its weight is read once and little is computed
for padding. Tiles that share a weight all have three parts: programs that read it in step find it in
the L2 cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ops._triton.kernels.hopper_ring import (
    GROUPS,
    RAGGED_END,
    WORKER_REGISTERS,
    WORKER_WARPS,
    accumulator_layout,
    async_load,
    new_ring,
    next_buffer,
    store_tile,
)
from moe_ops._triton.kernels.schedule import tile_of

# Rows of a part, and parts of a tile.
ROWS = gl.constexpr(64)
PARTS = gl.constexpr(3)


@gluon.jit
def _tall_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Return the expert, first row, end row, column tile and number of parts at position t."""
    tile_m, tile_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
    e = gl.load(tiles_ptr + tile_m)
    first = gl.load(tiles_ptr + max_tiles + tile_m)
    end = gl.load(tiles_ptr + 2 * max_tiles + tile_m)
    before = gl.load(tiles_ptr + tile_m - 1, mask=tile_m > 0, other=-1)
    parts = gl.where(before == e, PARTS, gl.minimum(gl.cdiv(end - first, ROWS), PARTS))
    return e, first, end, tile_n, parts


@gluon.jit
def _load_tile(
    x_desc, b_desc, ring, step, e, first, n0, NUM: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load NUM parts of x and both halves of b, for every step of a tile; return the step after."""
    COLS: gl.constexpr = BLOCK_N // GROUPS
    BYTES: gl.constexpr = (NUM * ROWS + BLOCK_N) * BLOCK_K * x_desc.dtype.primitive_bitwidth // 8
    xs, bs, full, empty = ring[:4]
    for k0 in range(0, ring[7], BLOCK_K):
        stage, barrier = next_buffer(full, empty, step, BYTES, STAGES)
        for part in gl.static_range(NUM):
            x = xs.index(stage * PARTS + part)
            async_load(x_desc, [first + part * ROWS, k0], barrier, x)
        for half in gl.static_range(GROUPS):
            b = bs.index(stage * GROUPS + half)
            if B_IS_NK:
                async_load(b_desc, [e, n0 + half * COLS, k0], barrier, b)
            else:
                async_load(b_desc, [e, k0, n0 + half * COLS], barrier, b)
        step += 1
    return step


@gluon.jit
def _load(
    x_desc, b_desc, ring, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the operands of every tile; one warp does."""
    tiles_ptr, max_tiles, tiles_n = ring[4:7]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        e, first, _, tile_n, parts = _tall_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        n0 = tile_n * BLOCK_N
        if parts == 1:
            step = _load_tile(
                x_desc, b_desc, ring, step, e, first, n0, 1, BLOCK_N, BLOCK_K, B_IS_NK, STAGES
            )
        elif parts == 2:
            step = _load_tile(
                x_desc, b_desc, ring, step, e, first, n0, 2, BLOCK_N, BLOCK_K, B_IS_NK, STAGES
            )
        else:
            step = _load_tile(
                x_desc, b_desc, ring, step, e, first, n0, 3, BLOCK_N, BLOCK_K, B_IS_NK, STAGES
            )


@gluon.jit
def _multiply_tile(
    y_desc, buffer, ring, step, first, end, n0, GROUP: gl.constexpr, NUM: gl.constexpr,
    COLS: gl.constexpr, BLOCK_K: gl.constexpr, B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute and store NUM parts of a tile, a group's columns; return the step after the tile."""
    xs, bs, full, empty = ring[:4]
    num_steps = gl.cdiv(ring[7], BLOCK_K)
    layout: gl.constexpr = accumulator_layout(COLS)
    # Names in place of a tuple, which Triton 3.6 does not carry through a loop.
    y0 = gl.zeros([ROWS, COLS], gl.float32, layout)
    if NUM > 1:
        y1 = gl.zeros([ROWS, COLS], gl.float32, layout)
    if NUM > 2:
        y2 = gl.zeros([ROWS, COLS], gl.float32, layout)
    for i in range(num_steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        b = bs.index(stage * GROUPS + GROUP)
        b = b.reshape([COLS, BLOCK_K]).permute((1, 0)) if B_IS_NK else b.reshape([BLOCK_K, COLS])
        y0 = warpgroup_mma(xs.index(stage * PARTS), b, y0, is_async=True)
        if NUM > 1:
            y1 = warpgroup_mma(xs.index(stage * PARTS + 1), b, y1, is_async=True)
        if NUM > 2:
            y2 = warpgroup_mma(xs.index(stage * PARTS + 2), b, y2, is_async=True)
        # Now the products of the step before are done, so its buffer is free.
        if NUM == 1:
            y0 = warpgroup_mma_wait(1, deps=[y0])
        elif NUM == 2:
            y0, y1 = warpgroup_mma_wait(2, deps=[y0, y1])
        else:
            y0, y1, y2 = warpgroup_mma_wait(3, deps=[y0, y1, y2])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    if NUM == 1:
        y0 = warpgroup_mma_wait(0, deps=[y0])
    elif NUM == 2:
        y0, y1 = warpgroup_mma_wait(0, deps=[y0, y1])
    else:
        y0, y1, y2 = warpgroup_mma_wait(0, deps=[y0, y1, y2])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=num_steps > 0)
    row = RAGGED_END - (end - first)
    store_tile(y_desc, buffer, y0, [RAGGED_END, end, row, n0], 0)
    if NUM > 1:
        store_tile(y_desc, buffer, y1, [RAGGED_END, end, row + ROWS, n0], 0)
    if NUM > 2:
        store_tile(y_desc, buffer, y2, [RAGGED_END, end, row + 2 * ROWS, n0], 0)
    return step


@gluon.jit
def _multiply(
    y_desc, ys, ring, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one group's columns of each tile of y."""
    COLS: gl.constexpr = BLOCK_N // GROUPS
    tiles_ptr, max_tiles, tiles_n = ring[4:7]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    buffer = ys.index(GROUP)
    step = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        _, first, end, tile_n, parts = _tall_tile(
            t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M
        )
        n0 = tile_n * BLOCK_N + GROUP * COLS
        if parts == 1:
            step = _multiply_tile(
                y_desc, buffer, ring, step, first, end, n0, GROUP, 1, COLS, BLOCK_K, B_IS_NK, STAGES
            )
        elif parts == 2:
            step = _multiply_tile(
                y_desc, buffer, ring, step, first, end, n0, GROUP, 2, COLS, BLOCK_K, B_IS_NK, STAGES
            )
        else:
            step = _multiply_tile(
                y_desc, buffer, ring, step, first, end, n0, GROUP, 3, COLS, BLOCK_K, B_IS_NK, STAGES
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def grouped_gemm_tall_kernel(
    x_desc, b_desc, y_desc, tiles_ptr, max_tiles, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute y[row] = x[row] @ b[e], rows in expert order: grouped_gemm_kernel's bare product.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... Needs the schedule
    of tiles of BLOCK_M rows, and writes the rows of its tiles only. Blocks of x_desc and y_desc have
    ROWS rows, those of b_desc and y_desc half of BLOCK_N columns.
    """
    gl.static_assert(BLOCK_M == PARTS * ROWS)
    COLS: gl.constexpr = BLOCK_N // GROUPS
    B_SHAPE: gl.constexpr = [1, COLS, BLOCK_K] if B_IS_NK else [1, BLOCK_K, COLS]
    tiles_n = gl.cdiv(N, BLOCK_N)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PARTS, ROWS, BLOCK_K], x_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES * GROUPS] + B_SHAPE, b_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 1, 1, ROWS, COLS], y_desc.layout)
    full, empty = new_ring(STAGES, GROUPS)
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (_multiply, (y_desc, ys, ring, 0, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES)),
            (_multiply, (y_desc, ys, ring, 1, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES)),
            (_load, (x_desc, b_desc, ring, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )
