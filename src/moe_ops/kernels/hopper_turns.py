# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMMs for Hopper whose two groups of warps take turns: one multiplies, one finishes a tile.

As in kernels/hopper.py a warp loads through a ring of buffers. Here each group has tiles of its own,
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

from moe_ops.kernels.activations import gated_activation
from moe_ops.kernels.hopper import (
    GROUPS,
    RAGGED_END,
    WORKER_REGISTERS,
    WORKER_WARPS,
    accumulator_layout,
    async_load,
    async_store,
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
# Of a chunk: the gate's buffer and the up's.
_GATE = gl.constexpr(0)
_UP = gl.constexpr(1)


@gluon.jit
def _new_turns():
    """The groups' barriers."""
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    return turns


@gluon.jit
def _multiply_in_turn(
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
def _columns(tile, PARTS: gl.constexpr):
    """The tile's columns in 1, 2, 4 or 8 parts, from left to right."""
    ROWS: gl.constexpr = tile.shape[0]
    HALF: gl.constexpr = tile.shape[1] // 2
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tile.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
        parts = _columns(left, PARTS // 2) + _columns(right, PARTS // 2)
    return parts


@gluon.jit
def _joined(left, right):
    """The inverse of _columns in 2 parts."""
    ROWS: gl.constexpr = left.shape[0]
    COLS: gl.constexpr = left.shape[1]
    return gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * COLS])


@gluon.jit
def _slots_of_rows(
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
def _weights_of_slots(scale_ptr, slots, num_rows, top_k, stride_st, stride_sk):
    """Their router weights, in fp32."""
    are_slots = (slots >= 0) & (slots < num_rows)
    pointers = (
        scale_ptr
        + (slots // top_k).to(gl.int64) * stride_st
        + (slots % top_k).to(gl.int64) * stride_sk
    )
    return gl.load(pointers, mask=are_slots, other=0).to(gl.float32)


@gluon.jit
def _add_bias(acc, bias_ptr, e, n0, N, stride_bias_e, stride_bias_n):
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
            y_rows = _slots_of_rows(
                gather_ptr, first, end, BLOCK_M, True, gl.SliceLayout(1, ROWWISE)
            )
        if HAS_SCALE:
            slots = _slots_of_rows(
                gather_ptr, first, end, BLOCK_M, HAS_GATHER, gl.SliceLayout(1, layout)
            )
            scale = _weights_of_slots(scale_ptr, slots, num_rows, top_k, stride_st, stride_sk)
        y = _multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, B_IS_NK, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        turn += 1
        parts = _columns(y, SUBTILE)
        for part in gl.static_range(SUBTILE):
            n0 = tile_n * BLOCK_N + part * COLS
            values = gl.convert_layout(parts[part], layout, assert_trivial=True)
            if HAS_BIAS:
                values = _add_bias(values, bias_ptr, e, n0, N, stride_bias_e, stride_bias_n)
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
def grouped_gemm_hopper_turns_kernel(
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
    turns = _new_turns()
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
def _up_multiply(
    z_desc, h_desc, buffers, ring, turns, limit, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr, STORE_Z: gl.constexpr, STORE_H: gl.constexpr,
):  # fmt: skip
    """One group: its tiles of z, and of h."""
    BLOCK_I: gl.constexpr = BLOCK_N // 2
    COLS: gl.constexpr = BLOCK_I // SUBTILE
    tiles_ptr, max_tiles, tiles_n, K = ring[4:]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    num_steps = gl.cdiv(K, BLOCK_K)
    first_buffer = buffers.index(GROUP * 2)
    second_buffer = buffers.index(GROUP * 2 + 1)
    turn = 0
    first_tile = gl.program_id(0) + GROUP * gl.num_programs(0)
    for t in range(first_tile, tiles_m * tiles_n, GROUPS * gl.num_programs(0)):
        _, first, end, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        z = _multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, True, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        turn += 1
        halves = _columns(z, 2)
        gates = _columns(halves[0], SUBTILE)
        ups = _columns(halves[1], SUBTILE)
        row = RAGGED_END - (end - first)
        for part in gl.static_range(SUBTILE):
            i0 = tile_n * BLOCK_I + part * COLS
            if STORE_Z:
                store_tile(z_desc, first_buffer, gates[part], [RAGGED_END, end, row, _GATE, i0], 0)
                store_tile(z_desc, second_buffer, ups[part], [RAGGED_END, end, row, _UP, i0], 1)
            if STORE_H:
                h, _, _ = gated_activation(gates[part], ups[part], limit, ACTIVATION, HAS_LIMIT)
                # Through gate's buffer, whose store is the last but one.
                store_tile(
                    h_desc, first_buffer, h, [RAGGED_END, end, row, 0, i0], 1 if STORE_Z else 0
                )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def expert_up_hopper_kernel(
    x_desc, b_desc, z_desc, h_desc, tiles_ptr, max_tiles, width, K, limit,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr, STORE_Z: gl.constexpr, STORE_H: gl.constexpr,
):  # fmt: skip
    """z[row] = x[row] @ b[e], h[row] = act(gate) * up, rows in expert order; z = gate and up, apart.

    b is stored (N, K), gate's rows before up's. Grid (any,), persistent. A tile has BLOCK_N // 2
    columns of gate and the same of up. Writes the rows of the schedule's tiles alone, z (M, 2 *
    width) and h (M, width), where asked for. Their descriptors have blocks of a SUBTILE-th of those
    columns.
    """
    BLOCK_I: gl.constexpr = BLOCK_N // 2
    COLS: gl.constexpr = BLOCK_I // SUBTILE
    tiles_n = gl.cdiv(width, BLOCK_I)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 1, 2, BLOCK_I, BLOCK_K], b_desc.layout)
    # z's and h's are alike.
    buffers = gl.allocate_shared_memory(
        h_desc.dtype, [GROUPS * 2, 1, 1, BLOCK_M, 1, COLS], h_desc.layout
    )
    full, empty = new_ring(STAGES, 1)
    turns = _new_turns()
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (
                _up_multiply,
                (
                    z_desc, h_desc, buffers, ring, turns, limit, 0, BLOCK_M, BLOCK_N, BLOCK_K,
                    GROUP_M, STAGES, SUBTILE, ACTIVATION, HAS_LIMIT, STORE_Z, STORE_H,
                ),
            ),
            (
                _up_multiply,
                (
                    z_desc, h_desc, buffers, ring, turns, limit, 1, BLOCK_M, BLOCK_N, BLOCK_K,
                    GROUP_M, STAGES, SUBTILE, ACTIVATION, HAS_LIMIT, STORE_Z, STORE_H,
                ),
            ),
            (
                load_operands,
                (
                    x_desc, b_desc, ring, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, True, STAGES, 1,
                    True,
                ),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _load_chunk(z_desc, zs, loaded, slot, end, row, i0, NUM_BYTES: gl.constexpr):
    """Begins to load gate and up, from column i0 on, to the slot's two buffers."""
    barrier = loaded.index(slot)
    mbarrier.expect(barrier, NUM_BYTES)
    async_load(z_desc, [RAGGED_END, end, row, _GATE, i0], barrier, zs.index(slot * 2 + _GATE))
    async_load(z_desc, [RAGGED_END, end, row, _UP, i0], barrier, zs.index(slot * 2 + _UP))


@gluon.jit
def _activation_bwd(
    dh, gate, up, scale, limit, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr
):  # fmt: skip
    """The gradients of gate and up, the weighted h, and <dh, h> of each row."""
    dtype: gl.constexpr = gate.dtype
    layout: gl.constexpr = accumulator_layout(gate.shape[1])
    dh = gl.convert_layout(dh, layout, assert_trivial=True).to(gl.float32)
    gate = gl.convert_layout(gate, layout, assert_trivial=True).to(gl.float32)
    up = gl.convert_layout(up, layout, assert_trivial=True).to(gl.float32)
    h, d_gate, d_up = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
    dots = gl.sum(dh * h, 1)
    dh *= scale
    return (dh * d_gate).to(dtype), (dh * d_up).to(dtype), (h * scale).to(dtype), dots


@gluon.jit
def _down_bwd_multiply(
    z_desc, dz_desc, sh_desc, scale_ptr, gather_ptr, dots_ptr, num_rows, top_k,
    stride_st, stride_sk, limit, zs, hs, loaded, ring, turns, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SCALE: gl.constexpr,
    STORE_H: gl.constexpr, STORE_DOTS: gl.constexpr,
):  # fmt: skip
    """One group: its tiles of dh, and what they become.

    z comes in chunks of columns through SLOTS slots of buffers, in which dz leaves.
    """
    # A slot serves as many chunks of each tile, an even number: its barrier's phase begins anew.
    gl.static_assert(CHUNKS % (2 * SLOTS) == 0)
    COLS: gl.constexpr = BLOCK_N // CHUNKS
    NUM_BYTES: gl.constexpr = 2 * BLOCK_M * COLS * z_desc.dtype.primitive_bitwidth // 8
    STORES: gl.constexpr = 3 if STORE_H else 2
    layout: gl.constexpr = accumulator_layout(COLS)
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(COLS // 2))
    tiles_ptr, max_tiles, tiles_n, K = ring[4:]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    num_steps = gl.cdiv(K, BLOCK_K)
    turn = 0
    first_tile = gl.program_id(0) + GROUP * gl.num_programs(0)
    for t in range(first_tile, tiles_m * tiles_n, GROUPS * gl.num_programs(0)):
        _, first, end, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        row = RAGGED_END - (end - first)
        i0 = tile_n * BLOCK_N
        # What the tile before stored has left its buffers.
        tma.store_wait(0)
        for c in gl.static_range(SLOTS):
            slot = GROUP * SLOTS + c
            _load_chunk(z_desc, zs, loaded, slot, end, row, i0 + c * COLS, NUM_BYTES)
        product = _multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, B_IS_NK, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        routed = _slots_of_rows(gather_ptr, first, end, BLOCK_M, True, row_layout)
        is_routed = (routed >= 0) & (routed < num_rows)
        scale = gl.full([BLOCK_M], 1.0, gl.float32, row_layout)
        if HAS_SCALE:
            scale = _weights_of_slots(scale_ptr, routed, num_rows, top_k, stride_st, stride_sk)
        scale = scale.expand_dims(1)
        turn += 1
        # Rounded, as the other kernels store it, it takes half of the registers.
        chunks = _columns(product.to(z_desc.dtype), CHUNKS)
        dots = gl.zeros([BLOCK_M], gl.float32, row_layout)
        for c in gl.static_range(CHUNKS):
            slot = GROUP * SLOTS + c % SLOTS
            mbarrier.wait(loaded.index(slot), (c // SLOTS) % 2)
            gates = zs.index(slot * 2 + _GATE)
            ups = zs.index(slot * 2 + _UP)
            gate = _columns(gates.reshape([BLOCK_M, COLS]).load(layout), 2)
            up = _columns(ups.reshape([BLOCK_M, COLS]).load(layout), 2)
            dh = _columns(chunks[c], 2)
            # One half after the other: there are no registers for both.
            gate_0, up_0, h_0, dots_0 = _activation_bwd(
                dh[0], gate[0], up[0], scale, limit, ACTIVATION, HAS_LIMIT
            )
            gate_1, up_1, h_1, dots_1 = _activation_bwd(
                dh[1], gate[1], up[1], scale, limit, ACTIVATION, HAS_LIMIT
            )
            dots += dots_0 + dots_1
            gates.reshape([BLOCK_M, COLS]).store(_joined(gate_0, gate_1))
            ups.reshape([BLOCK_M, COLS]).store(_joined(up_0, up_1))
            if STORE_H:
                hs.index(slot).reshape([BLOCK_M, COLS]).store(_joined(h_0, h_1))
            fence_async_shared()
            async_store(dz_desc, [RAGGED_END, end, row, _GATE, i0 + c * COLS], gates)
            async_store(dz_desc, [RAGGED_END, end, row, _UP, i0 + c * COLS], ups)
            if STORE_H:
                async_store(sh_desc, [RAGGED_END, end, row, 0, i0 + c * COLS], hs.index(slot))
            if c + 1 >= SLOTS and c + 1 < CHUNKS:
                # Its slot's last stores are done; with two slots the other's may go on.
                tma.store_wait(STORES * (SLOTS - 1))
                next_slot = GROUP * SLOTS + (c + 1) % SLOTS
                next_i0 = i0 + (c + 1) * COLS
                _load_chunk(z_desc, zs, loaded, next_slot, end, row, next_i0, NUM_BYTES)
        if STORE_DOTS:
            gl.store(dots_ptr + tile_n.to(gl.int64) * num_rows + routed, dots, mask=is_routed)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles", "num_rows"])
def expert_down_bwd_hopper_kernel(
    dy_desc, b_desc, z_desc, dz_desc, sh_desc, scale_ptr, gather_ptr, dots_ptr, tiles_ptr,
    max_tiles, num_rows, N, K, top_k, limit, stride_st, stride_sk,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SCALE: gl.constexpr,
    STORE_H: gl.constexpr, STORE_DOTS: gl.constexpr,
):  # fmt: skip
    """dh[row] = dy[row] @ b[e], and of it what _expert_activation_bwd_kernel makes, not stored itself.

    dz (M, 2 * N) = scale * dh * act'(z), gate and up apart; sh (M, N) = scale * h; and for each column
    tile dots[column tile, slot] = <dh, h> of its columns. Grid (any,), persistent. Writes the rows of
    the schedule's tiles alone. The descriptors of z, dz and sh have blocks of a CHUNKS-th of a tile's
    columns.
    """
    B_SHAPE: gl.constexpr = [1, BLOCK_N, BLOCK_K] if B_IS_NK else [1, BLOCK_K, BLOCK_N]
    COLS: gl.constexpr = BLOCK_N // CHUNKS
    tiles_n = gl.cdiv(N, BLOCK_N)
    xs = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], dy_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SHAPE, b_desc.layout)
    zs = gl.allocate_shared_memory(
        z_desc.dtype, [GROUPS * SLOTS * 2, 1, 1, BLOCK_M, 1, COLS], z_desc.layout
    )
    # Without h nothing reads or writes its buffers.
    hs = zs
    if STORE_H:
        hs = gl.allocate_shared_memory(
            z_desc.dtype, [GROUPS * SLOTS, 1, 1, BLOCK_M, 1, COLS], z_desc.layout
        )
    loaded = gl.allocate_shared_memory(gl.int64, [GROUPS * SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(GROUPS * SLOTS):
        mbarrier.init(loaded.index(slot), count=1)
    full, empty = new_ring(STAGES, 1)
    turns = _new_turns()
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (
                _down_bwd_multiply,
                (
                    z_desc, dz_desc, sh_desc, scale_ptr, gather_ptr, dots_ptr, num_rows, top_k,
                    stride_st, stride_sk, limit, zs, hs, loaded, ring, turns, 0, BLOCK_M, BLOCK_N,
                    BLOCK_K, GROUP_M, B_IS_NK, STAGES, CHUNKS, SLOTS, ACTIVATION, HAS_LIMIT,
                    HAS_SCALE, STORE_H, STORE_DOTS,
                ),
            ),
            (
                _down_bwd_multiply,
                (
                    z_desc, dz_desc, sh_desc, scale_ptr, gather_ptr, dots_ptr, num_rows, top_k,
                    stride_st, stride_sk, limit, zs, hs, loaded, ring, turns, 1, BLOCK_M, BLOCK_N,
                    BLOCK_K, GROUP_M, B_IS_NK, STAGES, CHUNKS, SLOTS, ACTIVATION, HAS_LIMIT,
                    HAS_SCALE, STORE_H, STORE_DOTS,
                ),
            ),
            (
                load_operands,
                (
                    dy_desc, b_desc, ring, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, B_IS_NK, STAGES, 1,
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
        dw = _multiply_in_turn(
            ring, turns, turn, step, num_steps,
            GROUP, True, False, BLOCK_N, BLOCK_D, BLOCK_M, STAGES,
        )  # fmt: skip
        turn += 1
        step += num_steps
        if GROUP == 0:
            step += others
        parts = _columns(dw, SUBTILE)
        for part in gl.static_range(SUBTILE):
            store_tile(dw_desc, buffer, parts[part], [e, n0, d0 + part * COLS], 0)
    tma.store_wait(0)


@gluon.jit
def grouped_gemm_bwd_dw_hopper_turns_kernel(
    g_desc, x_desc, dw_desc, offsets_ptr, num_experts, N, D,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr,
):  # fmt: skip
    """grouped_gemm_bwd_dw_hopper_kernel, in turns; dw_desc has blocks of a SUBTILE-th of its columns."""
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles_d = gl.cdiv(D, BLOCK_D)
    gs = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_N], g_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], x_desc.layout)
    dws = gl.allocate_shared_memory(
        dw_desc.dtype, [GROUPS, 1, BLOCK_N, BLOCK_D // SUBTILE], dw_desc.layout
    )
    full, empty = new_ring(STAGES, 1)
    turns = _new_turns()
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
