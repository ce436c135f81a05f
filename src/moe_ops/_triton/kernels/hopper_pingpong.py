# SPDX-License-Identifier: Apache-2.0
"""Compute grouped GEMMs on Hopper with ping-pong groups of warps, in Gluon.

One warp loads through the ring of buffers (hopper_ring.py). Each of two groups has tiles of its
own: every second tile of the program. While one group multiplies, the other runs its tile's
epilogue. So the tensor cores wait neither for a store nor for an activation. The price is a tile
half as wide as a cooperative one: each operand read from the L2 cache serves fewer products.

The letters are those of grouped_gemm.py and grouped_gemm_dw.py.

The groups take turns at multiplying. The barrier turns[group] tells a group that its turn has come:
the other group arrives there once its own products are under way. Without turns a group would wait
for ring buffers several rounds ahead, and a barrier cannot tell those from the next round's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_ops._triton.kernels.hopper_ring import (
    GROUPS,
    RAGGED_END,
    WORKER_REGISTERS,
    WORKER_WARPS,
    accumulator_layout,
    begin_product,
    dw_tile,
    end_product,
    load_dw_operands,
    load_operands,
    new_ring,
    scheduled_tile,
    store_tile,
)

# How many neighbouring elements of a row a thread stores.
_VECTOR = gl.constexpr(8)


@gluon.jit
def new_turns():
    """Make the ping-pong barriers: one for each group's turn."""
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    return turns


@gluon.jit
def multiply_in_turn(
    ring, turns, turn, step, num_steps,
    GROUP: gl.constexpr, LEFT_IS_KM: gl.constexpr, RIGHT_IS_NK: gl.constexpr,
    ROWS: gl.constexpr, COLS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply in ping-pong: wait for the turn, then compute the group's tile number `turn`."""
    left, right, full, empty = ring[:4]
    # The first group does not wait for its first turn.
    mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
    acc = begin_product(
        left, right, full, empty, step, num_steps,
        0, 1, LEFT_IS_KM, RIGHT_IS_NK, ROWS, COLS, DEPTH, STAGES,
    )  # fmt: skip
    # One thread arrives. All threads of this group must meet before it does. Otherwise the other
    # group could end its turn while some threads here still wait for this one. They would miss its
    # phase and wait for the phase after next. A tile of dW may have no steps. Then the threads meet
    # only at the barrier that Triton puts here, after the loop: tests/architectures looks for it.
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    acc, _ = end_product(acc, empty, step, num_steps, STAGES)
    return acc


@gluon.jit
def split_columns(tile, PARTS: gl.constexpr):
    """Split the tile's columns into 1, 2, 4 or 8 parts, from left to right."""
    ROWS: gl.constexpr = tile.shape[0]
    HALF: gl.constexpr = tile.shape[1] // 2
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tile.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
        parts = split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)
    return parts


@gluon.jit
def join_columns(left, right):
    """Join two halves of columns; the inverse of split_columns(tile, 2)."""
    ROWS: gl.constexpr = left.shape[0]
    COLS: gl.constexpr = left.shape[1]
    return gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * COLS])


@gluon.jit
def slots_of_rows(
    gather_ptr, first, end,
    BLOCK_M: gl.constexpr, HAS_GATHER: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Return the slots of a tile's rows, -1 past the expert's end."""
    rows = first + gl.arange(0, BLOCK_M, layout)
    if HAS_GATHER:
        slots = gl.load(gather_ptr + rows, mask=rows < end, other=-1)
    else:
        slots = gl.where(rows < end, rows, -1)
    return slots


@gluon.jit
def weights_of_slots(scale_ptr, slots, num_rows, top_k, stride_st, stride_sk):
    """Return the router weights of slots, in fp32."""
    are_slots = (slots >= 0) & (slots < num_rows)
    pointers = (
        scale_ptr
        + (slots // top_k).to(gl.int64) * stride_st
        + (slots % top_k).to(gl.int64) * stride_sk
    )
    return gl.load(pointers, mask=are_slots, other=0).to(gl.float32)


@gluon.jit
def add_bias(acc, bias_ptr, e, n0, N, stride_bias_e, stride_bias_n):
    """Return acc + bias[e], where acc begins at column n0."""
    layout: gl.constexpr = accumulator_layout(acc.shape[1])
    cols = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    pointers = bias_ptr + e.to(gl.int64) * stride_bias_e + cols.to(gl.int64) * stride_bias_n
    return acc + gl.load(pointers, mask=cols < N, other=0).to(gl.float32).expand_dims(0)


@gluon.jit
def _gemm_multiply(
    y_desc, y_ptr, bias_ptr, scale_ptr, gather_ptr, num_rows, N, top_k,
    stride_bias_e, stride_bias_n, stride_st, stride_sk, ys, ring, turns, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_GATHER: gl.constexpr, SCATTER_Y: gl.constexpr, SUBTILE: gl.constexpr,
):  # fmt: skip
    """Compute one group's tiles of y."""
    COLS: gl.constexpr = BLOCK_N // SUBTILE
    layout: gl.constexpr = accumulator_layout(COLS)
    # A row has this many vectors, and as many threads of a warp store it.
    ACROSS: gl.constexpr = COLS // _VECTOR
    ROWWISE: gl.constexpr = gl.BlockedLayout([1, _VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    tiles_ptr, max_tiles, tiles_n, K = ring[4:]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    num_steps = gl.cdiv(K, BLOCK_K)
    buffer = ys.index(GROUP)
    turn = 0
    first_tile = gl.program_id(0) + GROUP * gl.num_programs(0)
    for t in range(first_tile, tiles_m * tiles_n, GROUPS * gl.num_programs(0)):
        e, first, end, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        # These loads begin before the product, which takes longer. Do not read y_rows here: that
        # would wait for the load, and cost a fifth of the speed if the contraction is short.
        if SCATTER_Y:
            y_rows = slots_of_rows(
                gather_ptr, first, end, BLOCK_M, True, gl.SliceLayout(1, ROWWISE)
            )
        if HAS_SCALE:
            slots = slots_of_rows(
                gather_ptr, first, end, BLOCK_M, HAS_GATHER, gl.SliceLayout(1, layout)
            )
            scale = weights_of_slots(scale_ptr, slots, num_rows, top_k, stride_st, stride_sk)
        y = multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, B_IS_NK, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        turn += 1
        parts = split_columns(y, SUBTILE)
        for part in gl.static_range(SUBTILE):
            n0 = tile_n * BLOCK_N + part * COLS
            values = gl.convert_layout(parts[part], layout, assert_trivial=True)
            if HAS_BIAS:
                values = add_bias(values, bias_ptr, e, n0, N, stride_bias_e, stride_bias_n)
            if HAS_SCALE:
                values *= scale.expand_dims(1)
            if SCATTER_Y:
                # Through shared memory: from there a thread reads 8 neighbours of one row.
                stored = buffer.reshape([BLOCK_M, COLS])
                stored.store(values.to(y_desc.dtype))
                cols = n0 + gl.arange(0, COLS, gl.SliceLayout(0, ROWWISE))
                in_y = (y_rows >= 0) & (y_rows < num_rows)
                pointers = y_ptr + y_rows.to(gl.int64).expand_dims(1) * N + cols.expand_dims(0)
                mask = in_y.expand_dims(1) & (cols < N).expand_dims(0)
                gl.store(pointers, stored.load(ROWWISE), mask=mask)
            else:
                row = RAGGED_END - (end - first)
                store_tile(y_desc, buffer, values, [RAGGED_END, end, row, n0], 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles", "num_rows"])
def grouped_gemm_pingpong_kernel(
    x_desc, b_desc, y_desc, y_ptr, bias_ptr, scale_ptr, gather_ptr, tiles_ptr, max_tiles, num_rows,
    N, K, top_k, stride_bias_e, stride_bias_n, stride_st, stride_sk,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    HAS_GATHER: gl.constexpr, SCATTER_Y: gl.constexpr, SUBTILE: gl.constexpr,
):  # fmt: skip
    """Compute y[row] = scale * (x[row] @ b[e] + bias[e]), rows in expert order.

    A row's slot is gather[row], or the row itself without HAS_GATHER. scale is the slot's router
    weight. With SCATTER_Y the result is stored at y[slot]. Grid (any,), persistent: a program's
    groups own its tiles pid, pid + grid size, ... in turn. Needs the schedule, and writes the rows
    of its tiles only, with SCATTER_Y only those with a valid slot. A block of y_desc has
    BLOCK_N // SUBTILE columns.
    """
    B_SHAPE: gl.constexpr = [1, BLOCK_N, BLOCK_K] if B_IS_NK else [1, BLOCK_K, BLOCK_N]
    COLS: gl.constexpr = BLOCK_N // SUBTILE
    tiles_n = gl.cdiv(N, BLOCK_N)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SHAPE, b_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 1, 1, BLOCK_M, COLS], y_desc.layout)
    full, empty = new_ring(STAGES, 1)
    turns = new_turns()
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (
                _gemm_multiply,
                (
                    y_desc, y_ptr, bias_ptr, scale_ptr, gather_ptr, num_rows, N, top_k,
                    stride_bias_e, stride_bias_n, stride_st, stride_sk, ys, ring, turns, 0,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES, HAS_BIAS, HAS_SCALE,
                    HAS_GATHER, SCATTER_Y, SUBTILE,
                ),
            ),
            (
                _gemm_multiply,
                (
                    y_desc, y_ptr, bias_ptr, scale_ptr, gather_ptr, num_rows, N, top_k,
                    stride_bias_e, stride_bias_n, stride_st, stride_sk, ys, ring, turns, 1,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES, HAS_BIAS, HAS_SCALE,
                    HAS_GATHER, SCATTER_Y, SUBTILE,
                ),
            ),
            (
                load_operands,
                (
                    x_desc, b_desc, ring, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES, 1,
                    False,
                ),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _steps_of(t, num_tiles, offsets_ptr, num_experts, tiles_of_expert, BLOCK_M: gl.constexpr):
    """Return the number of steps of dw's tile at position t, 0 past the last tile."""
    e = t // tiles_of_expert
    start = gl.load(offsets_ptr + e, mask=t < num_tiles, other=0)
    end = gl.load(offsets_ptr + num_experts + e, mask=t < num_tiles, other=0)
    return gl.cdiv(end - start, BLOCK_M)


@gluon.jit
def _dw_multiply(
    dw_desc, dws, ring, turns, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr,
):  # fmt: skip
    """Compute one group's tiles of dw."""
    COLS: gl.constexpr = BLOCK_D // SUBTILE
    offsets_ptr, num_experts, tiles_n, tiles_d = ring[4:]
    tiles_of_expert = tiles_n * tiles_d
    num_tiles = num_experts * tiles_of_expert
    buffer = dws.index(GROUP)
    turn = 0
    step = 0
    first_tile = gl.program_id(0) + GROUP * gl.num_programs(0)
    for t in range(first_tile, num_tiles, GROUPS * gl.num_programs(0)):
        e, start, end, n0, d0 = dw_tile(
            t, offsets_ptr, num_experts, tiles_n, tiles_d, BLOCK_N, BLOCK_D, GROUP_N
        )
        num_steps = gl.cdiv(end - start, BLOCK_M)
        # The ring has the first group's tile, then the second's: a group counts the steps of both.
        other = t + gl.num_programs(0) if GROUP == 0 else t - gl.num_programs(0)
        others = _steps_of(other, num_tiles, offsets_ptr, num_experts, tiles_of_expert, BLOCK_M)
        if GROUP == 1:
            step += others
        dw = multiply_in_turn(
            ring, turns, turn, step, num_steps,
            GROUP, True, False, BLOCK_N, BLOCK_D, BLOCK_M, STAGES,
        )  # fmt: skip
        turn += 1
        step += num_steps
        if GROUP == 0:
            step += others
        parts = split_columns(dw, SUBTILE)
        for part in gl.static_range(SUBTILE):
            store_tile(dw_desc, buffer, parts[part], [e, n0, d0 + part * COLS], 0)
    tma.store_wait(0)


@gluon.jit
def grouped_gemm_bwd_dw_pingpong_kernel(
    g_desc, x_desc, dw_desc, offsets_ptr, num_experts, N, D,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr,
):  # fmt: skip
    """Compute what grouped_gemm_bwd_dw_cooperative_kernel does, in ping-pong.

    A program's groups own its tiles in turn. A block of dw_desc has BLOCK_D // SUBTILE columns.
    """
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles_d = gl.cdiv(D, BLOCK_D)
    gs = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_N], g_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], x_desc.layout)
    dws = gl.allocate_shared_memory(
        dw_desc.dtype, [GROUPS, 1, BLOCK_N, BLOCK_D // SUBTILE], dw_desc.layout
    )
    full, empty = new_ring(STAGES, 1)
    turns = new_turns()
    ring = (gs, xs, full, empty, offsets_ptr, num_experts, tiles_n, tiles_d)
    gl.warp_specialize(
        [
            (
                _dw_multiply,
                (
                    dw_desc, dws, ring, turns, 0, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES,
                    SUBTILE,
                ),
            ),
            (
                _dw_multiply,
                (
                    dw_desc, dws, ring, turns, 1, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES,
                    SUBTILE,
                ),
            ),
            (
                load_dw_operands,
                (g_desc, x_desc, ring, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_N, STAGES, 1),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip
