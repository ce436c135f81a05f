# SPDX-License-Identifier: Apache-2.0
"""Fill and read the ring of buffers of the warp-specialised kernels for Hopper, in Gluon.

One warp loads tiles of the operands into a ring of STAGES buffers. Two groups of four warps
multiply them. A buffer is `full` once its bytes have arrived, and `empty` once its READERS have
multiplied it. In hopper_cooperative.py and hopper_tall.py both groups share a tile, so a buffer has
two readers. In hopper_pingpong.py each group has tiles of its own, so it has one.

M, N, K are a GEMM's, as in grouped_gemm.py. dW is (N, D) and contracts over M. e is an expert, t
the position of a tile.
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

# Triton 3.6 has the second name of each, later versions have the first.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# The coordinate at which a ragged descriptor's rows end (triton.tools.ragged_tma).
RAGGED_END = gl.constexpr(1 << 30)
GROUPS = gl.constexpr(2)
# The kernel's own warps are the first group. Beside it run the second group and the loading warp.
# The loading warp needs few registers and leaves the others to the accumulators.
WORKER_WARPS = gl.constexpr([4, 1])
WORKER_REGISTERS = gl.constexpr([240, 24])


@gluon.constexpr_function
def accumulator_layout(columns):
    """Return the layout in a group's threads of a product, or of a part, of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def new_ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Make the barriers of a ring: full and empty."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def next_buffer(full, empty, step, num_bytes: gl.constexpr, STAGES: gl.constexpr):
    """Wait until the step's buffer is empty; return its number and the barrier for its bytes."""
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
    """Sum left (ROWS, DEPTH) @ right (DEPTH, COLS) over num_steps buffers, in fp32; zeros for none.

    It begins at the ring's step `step`. A buffer's left has READERS parts, and this group
    multiplies part PART. The last product may still run: end_product waits for it.
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
        # Now the product before this one is done, so its buffer is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    return acc


@gluon.jit
def end_product(acc, empty, step, num_steps, STAGES: gl.constexpr):
    """Wait for the sum that begin_product began at `step`; return it and the step after it."""
    acc = warpgroup_mma_wait(0, deps=[acc])
    step += num_steps
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=num_steps > 0)
    return acc, step


@gluon.jit
def store_tile(desc, buffer, acc, place, OTHERS: gl.constexpr):
    """Begin to store acc at `place` of the descriptor, through one of the group's buffers.

    It first waits for all earlier stores but the last OTHERS, which went through other buffers.
    """
    tile = acc.to(desc.dtype)
    tma.store_wait(OTHERS)
    buffer.reshape(acc.shape).store(tile)
    fence_async_shared()
    async_store(desc, place, buffer)


@gluon.jit
def scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Return the expert, the first row, the end row and the column tile at position t."""
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
    """Load x, in a part for each reader, and b, for every step of every tile; one warp does.

    With HALVES a tile takes half of its columns from each half of b's columns, and b is stored as
    (N, K).
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
def dw_tile(
    t, offsets_ptr, num_experts, tiles_n, tiles_d,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
):  # fmt: skip
    """Return the expert, its first row and end row, and the first n and d of dW's tile at t."""
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
    """Load g, in a part for each reader, and x, for every step of every tile; one warp does."""
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
