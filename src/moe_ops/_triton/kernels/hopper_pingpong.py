# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMMs for Hopper whose two groups of warps take turns: one multiplies, one finishes a tile.

As in _triton/kernels/hopper_cooperative.py a warp loads through a ring of buffers. Here each group has tiles of its own,
every second one of the program's: while one multiplies, the other does what comes after its product.
The tensor cores wait for neither storing nor an activation. In return a tile is half as wide, and
an operand is read for fewer products, from the L2 cache, than one that both groups share.

turns[group] is arrived at by the other group, once its products are under way. Without turns a group
would wait for buffers of the ring that are several rounds ahead, which a barrier cannot tell from
the next round's.
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

# 8 elements of a row a thread.
_VECTOR = gl.constexpr(8)


@gluon.jit
def new_turns():
    """The groups' barriers."""
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
    """The group's product of its tile number `turn`, after the other group's before it."""
    left, right, full, empty = ring[:4]
    # The first group's first turn is nobody's to wait for.
    mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
    acc = begin_product(
        left, right, full, empty, step, num_steps,
        0, 1, LEFT_IS_KM, RIGHT_IS_NK, ROWS, COLS, DEPTH, STAGES,
    )  # fmt: skip
    # One thread arrives. Before that the group's threads have to meet, or the other group could be
    # done with its turn while some still wait for this one, and would then wait for the phase after
    # next. Of a tile without steps, in dW, nothing meets but at the barrier that Triton puts here,
    # after the loop over steps: tests/architectures looks for it.
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    acc, _ = end_product(acc, empty, step, num_steps, STAGES)
    return acc


@gluon.jit
def split_columns(tile, PARTS: gl.constexpr):
    """The tile's columns in 1, 2, 4 or 8 parts, from left to right."""
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
    """The inverse of columns in 2 parts."""
    ROWS: gl.constexpr = left.shape[0]
    COLS: gl.constexpr = left.shape[1]
    return gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * COLS])


@gluon.jit
def slots_of_rows(
    gather_ptr, first, end,
    BLOCK_M: gl.constexpr, HAS_GATHER: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The slots of a tile's rows; -1 past the expert's end."""
    rows = first + gl.arange(0, BLOCK_M, layout)
    if HAS_GATHER:
        slots = gl.load(gather_ptr + rows, mask=rows < end, other=-1)
    else:
        slots = gl.where(rows < end, rows, -1)
    return slots


@gluon.jit
def weights_of_slots(scale_ptr, slots, num_rows, top_k, stride_st, stride_sk):
    """Their router weights, in fp32."""
    are_slots = (slots >= 0) & (slots < num_rows)
    pointers = (
        scale_ptr
        + (slots // top_k).to(gl.int64) * stride_st
        + (slots % top_k).to(gl.int64) * stride_sk
    )
    return gl.load(pointers, mask=are_slots, other=0).to(gl.float32)


@gluon.jit
def add_bias(acc, bias_ptr, e, n0, N, stride_bias_e, stride_bias_n):
    """acc + bias[e], from column n0 on."""
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
    """One group: its tiles of y."""
    COLS: gl.constexpr = BLOCK_N // SUBTILE
    layout: gl.constexpr = accumulator_layout(COLS)
    # As many threads of a warp in a row as that has vectors.
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
        # Loaded before the product, which takes longer than that. Who looks at y_rows here waits for
        # them: where the contraction is short that would cost a fifth of the speed.
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
                # Through shared memory, from which a thread has 8 neighbours of one row.
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
    """y[row] = scale * (x[row] @ b[e] + bias[e]), with SCATTER_Y y[slot], rows in expert order.

    The slot of a row is gather[row], or the row itself, and scale the router weight of the slot.
    Grid (any,), persistent. Writes the rows of the schedule's tiles alone; scattered, those whose
    slot is one. y_desc has blocks of a SUBTILE-th of a tile's columns.
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
    """The steps of position t of dw's tiles; none past the last."""
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
    """One group: its tiles of dw."""
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
        # The other group's tile comes after the first one's, and before the second one's.
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
    """grouped_gemm_bwd_dw_cooperative_kernel, in turns; dw_desc has blocks of a SUBTILE-th of its columns."""
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
