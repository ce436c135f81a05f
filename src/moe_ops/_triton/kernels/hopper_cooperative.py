# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMMs for Hopper, in Gluon: one warp loads, two groups of four warps multiply and store.

The same products as in _triton/kernels/grouped_gemm.py, whose letters these are, for 16-bit operands that
descriptors describe. Each group has half of a tile's rows. The loading warp runs ahead through a ring
of STAGES buffers, out of one tile into the next: while a group stores, the other multiplies, and the
next tile's operands are on their way. With the loads in the groups' own loop, as Triton pipelines
them, each tile would begin by waiting for its first operands and end with nothing to multiply.

A buffer of the ring is `full` once its bytes have come, `empty` once its READERS, the groups that
multiply it, have done so: here both, in _triton/kernels/hopper_pingpong.py one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ops._triton.kernels.schedule import tile_of

# Triton 3.6 has the one name, later ones the other.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Where a ragged descriptor's rows end (triton.tools.ragged_tma).
RAGGED_END = gl.constexpr(1 << 30)
GROUPS = gl.constexpr(2)
# The kernel's own warps are the first group; beside it run the second one and the loading warp, which
# needs next to no registers and leaves them to the accumulators.
WORKER_WARPS = gl.constexpr([4, 1])
WORKER_REGISTERS = gl.constexpr([240, 24])


@gluon.constexpr_function
def accumulator_layout(columns):
    """Where a group's threads have a product of so many columns, or as many columns of a wider one."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def new_ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """The barriers of a ring: full, empty."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def next_buffer(full, empty, step, num_bytes: gl.constexpr, STAGES: gl.constexpr):
    """Waits until the step's buffer is empty; its number, and the barrier that the bytes tell."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    barrier = full.index(stage)
    mbarrier.expect(barrier, num_bytes)
    return stage, barrier


@gluon.jit
def begin_product(
    left, right, full, empty, step, num_steps,
    PART: gl.constexpr, READERS: gl.constexpr, LEFT_IS_KM: gl.constexpr, RIGHT_IS_NK: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum over num_steps buffers of left (ROWS, DEPTH) @ right (DEPTH, COLS), fp32; zeros without.

    Begins at the ring's step `step`. Of READERS parts of a buffer's left this group has the PART. The
    last product may not be done: end_product waits for it.
    """
    acc = gl.zeros([ROWS, COLS], gl.float32, accumulator_layout(COLS))
    for i in range(num_steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        a = left.index(stage * READERS + PART)
        if LEFT_IS_KM:
            a = a.reshape([DEPTH, ROWS]).permute((1, 0))
        b = right.index(stage)
        b = b.reshape([COLS, DEPTH]).permute((1, 0)) if RIGHT_IS_NK else b.reshape([DEPTH, COLS])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # The product before this one is done, so its buffer is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    return acc


@gluon.jit
def end_product(acc, empty, step, num_steps, STAGES: gl.constexpr):
    """The sum that begin_product began at the same step, and the step after it."""
    acc = warpgroup_mma_wait(0, deps=[acc])
    step += num_steps
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=num_steps > 0)
    return acc, step


@gluon.jit
def store_tile(desc, buffer, acc, place, OTHERS: gl.constexpr):
    """Stores acc at `place` of the descriptor, through one of the group's buffers, and does not wait.

    It does wait for all stores but the last OTHERS, which went through other buffers.
    """
    tile = acc.to(desc.dtype)
    tma.store_wait(OTHERS)
    buffer.reshape(acc.shape).store(tile)
    fence_async_shared()
    async_store(desc, place, buffer)


@gluon.jit
def scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Expert, first row and end row, and column tile of position t."""
    tile_m, tile_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
    e = gl.load(tiles_ptr + tile_m)
    first = gl.load(tiles_ptr + max_tiles + tile_m)
    end = gl.load(tiles_ptr + 2 * max_tiles + tile_m)
    return e, first, end, tile_n


@gluon.jit
def load_operands(
    x_desc, b_desc, ring,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The loading warp: x, a part for each reader, and b of each step of each tile.

    With HALVES a tile has half of its columns in each half of b's, which is stored (N, K).
    """
    ROWS: gl.constexpr = BLOCK_M // READERS
    STEP_N: gl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * x_desc.dtype.primitive_bitwidth // 8
    xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K = ring
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        e, first, _, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        n0 = tile_n * STEP_N
        for k0 in range(0, K, BLOCK_K):
            stage, barrier = next_buffer(full, empty, step, BYTES, STAGES)
            for part in gl.static_range(READERS):
                x = xs.index(stage * READERS + part)
                async_load(x_desc, [first + part * ROWS, k0], barrier, x)
            if HALVES:
                async_load(b_desc, [e, 0, n0, k0], barrier, bs.index(stage))
            elif B_IS_NK:
                async_load(b_desc, [e, n0, k0], barrier, bs.index(stage))
            else:
                async_load(b_desc, [e, k0, n0], barrier, bs.index(stage))
            step += 1


@gluon.jit
def _gemm_multiply(
    y_desc, ys, ring, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group: its rows of each tile of y."""
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
    """y[row] = x[row] @ b[e], rows in expert order; grouped_gemm_kernel without what that adds.

    Grid (any,), persistent. Writes the rows of the schedule's tiles alone.
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
def dw_tile(
    t, offsets_ptr, num_experts, tiles_n, tiles_d,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
):  # fmt: skip
    """Expert, its first row and end row, and the first n and d of position t."""
    e = t // (tiles_n * tiles_d)
    tile_n, tile_d = tile_of(t % (tiles_n * tiles_d), tiles_n, tiles_d, GROUP_N)
    start = gl.load(offsets_ptr + e)
    end = gl.load(offsets_ptr + num_experts + e)
    return e, start, end, tile_n * BLOCK_N, tile_d * BLOCK_D


@gluon.jit
def load_dw_operands(
    g_desc, x_desc, ring,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr, READERS: gl.constexpr,
):  # fmt: skip
    """The loading warp: g, a part for each reader, and x of each step of each tile."""
    ROWS: gl.constexpr = BLOCK_N // READERS
    BYTES: gl.constexpr = BLOCK_M * (BLOCK_N + BLOCK_D) * x_desc.dtype.primitive_bitwidth // 8
    gs, xs, full, empty, offsets_ptr, num_experts, tiles_n, tiles_d = ring
    step = 0
    for t in range(gl.program_id(0), num_experts * tiles_n * tiles_d, gl.num_programs(0)):
        _, start, end, n0, d0 = dw_tile(
            t, offsets_ptr, num_experts, tiles_n, tiles_d, BLOCK_N, BLOCK_D, GROUP_N
        )
        for m0 in range(0, end - start, BLOCK_M):
            stage, barrier = next_buffer(full, empty, step, BYTES, STAGES)
            row = RAGGED_END - (end - start) + m0
            for part in gl.static_range(READERS):
                g = gs.index(stage * READERS + part)
                async_load(g_desc, [RAGGED_END, end, row, n0 + part * ROWS], barrier, g)
            async_load(x_desc, [RAGGED_END, end, row, d0], barrier, xs.index(stage))
            step += 1


@gluon.jit
def _dw_multiply(
    dw_desc, dws, ring, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One group: its rows of each tile of dw."""
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
    """dw[e] (N, D) = sum over the rows m of expert e of outer(g[m], x[m]); zeros without rows.

    Grid (any,), persistent. Rows past an expert's end are zero-filled by the hardware. Writes all of dw.
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
