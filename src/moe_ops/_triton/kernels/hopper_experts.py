# SPDX-License-Identifier: Apache-2.0
"""Compute fused_experts' products on Hopper, with the activation or its backward on top.

The groups of warps work in ping-pong (hopper_pingpong.py): while one multiplies, the other computes
the activation. The letters are those of experts.py, and N, K those of each kernel's product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_ops._triton.kernels.activations import gated_activation
from moe_ops._triton.kernels.hopper_pingpong import (
    add_bias,
    join_columns,
    multiply_in_turn,
    new_turns,
    slots_of_rows,
    split_columns,
    weights_of_slots,
)
from moe_ops._triton.kernels.hopper_ring import (
    GROUPS,
    RAGGED_END,
    WORKER_REGISTERS,
    WORKER_WARPS,
    accumulator_layout,
    async_load,
    async_store,
    load_operands,
    new_ring,
    scheduled_tile,
    store_tile,
)

# The gate's and the up's place: in a pair of buffers, and among the parts of z.
_GATE = gl.constexpr(0)
_UP = gl.constexpr(1)


@gluon.jit
def _activated(
    first,
    second,
    limit,
    INTERLEAVED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
):
    """Return act(gate) * up of a piece of z.

    `first` and `second` are gate and up, or with INTERLEAVED the halves of the piece.
    """
    if INTERLEAVED:
        ROWS: gl.constexpr = first.shape[0]
        HALF: gl.constexpr = first.shape[1] // 2
        gate, up = first.reshape([ROWS, HALF, 2]).split()
        left, _, _ = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
        gate, up = second.reshape([ROWS, HALF, 2]).split()
        right, _, _ = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
        h = join_columns(left, right)
    else:
        h, _, _ = gated_activation(first, second, limit, ACTIVATION, HAS_LIMIT)
    return h


@gluon.jit
def _up_multiply(
    z_desc, h_desc, bias_ptr, width, limit, stride_bias_e, stride_bias_n,
    buffers, ring, turns, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, INTERLEAVED: gl.constexpr, STORE_Z: gl.constexpr, STORE_H: gl.constexpr,
):  # fmt: skip
    """Compute one group's tiles of z and h.

    It finishes a tile in pieces of COLS columns of h, which are 2 * COLS columns of z.
    """
    BLOCK_I: gl.constexpr = BLOCK_N // 2
    COLS: gl.constexpr = BLOCK_I // SUBTILE
    layout: gl.constexpr = accumulator_layout(COLS)
    tiles_ptr, max_tiles, tiles_n, K = ring[4:]
    tiles_m = gl.load(tiles_ptr + 3 * max_tiles)
    num_steps = gl.cdiv(K, BLOCK_K)
    first_buffer = buffers.index(GROUP * 2)
    second_buffer = buffers.index(GROUP * 2 + 1)
    turn = 0
    first_tile = gl.program_id(0) + GROUP * gl.num_programs(0)
    for t in range(first_tile, tiles_m * tiles_n, GROUPS * gl.num_programs(0)):
        e, start, end, tile_n = scheduled_tile(t, tiles_ptr, max_tiles, tiles_m, tiles_n, GROUP_M)
        z = multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, True, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        turn += 1
        pieces = split_columns(z, 2 * SUBTILE)
        row = RAGGED_END - (end - start)
        for part in gl.static_range(SUBTILE):
            i0 = tile_n * BLOCK_I + part * COLS
            if INTERLEAVED:
                first, second = pieces[2 * part], pieces[2 * part + 1]
                part_0, n_0, part_1, n_1 = 0, 2 * i0, 0, 2 * i0 + COLS
                bias_0, bias_1 = n_0, n_1
            else:
                first, second = pieces[part], pieces[SUBTILE + part]
                part_0, n_0, part_1, n_1 = _GATE, i0, _UP, i0
                bias_0, bias_1 = i0, width + i0
            if HAS_BIAS:
                first = gl.convert_layout(first, layout, assert_trivial=True)
                first = add_bias(
                    first, bias_ptr, e, bias_0, 2 * width, stride_bias_e, stride_bias_n
                )
                second = gl.convert_layout(second, layout, assert_trivial=True)
                second = add_bias(
                    second, bias_ptr, e, bias_1, 2 * width, stride_bias_e, stride_bias_n
                )
            if STORE_Z:
                store_tile(z_desc, first_buffer, first, [RAGGED_END, end, row, part_0, n_0], 0)
                store_tile(z_desc, second_buffer, second, [RAGGED_END, end, row, part_1, n_1], 1)
            if STORE_H:
                h = _activated(first, second, limit, INTERLEAVED, ACTIVATION, HAS_LIMIT)
                # h goes through the first buffer, whose store is the last but one.
                store_tile(
                    h_desc, first_buffer, h, [RAGGED_END, end, row, 0, i0], 1 if STORE_Z else 0
                )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def expert_up_pingpong_kernel(
    x_desc, b_desc, bias_ptr, z_desc, h_desc, tiles_ptr, max_tiles, width, K, limit,
    stride_bias_e, stride_bias_n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, SUBTILE: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, INTERLEAVED: gl.constexpr, STORE_Z: gl.constexpr, STORE_H: gl.constexpr,
):  # fmt: skip
    """Compute z[row] = x[row] @ b[e] + bias[e] and h[row] = act(gate) * up, rows in expert order.

    b is stored as (N, K), N = 2 * width. Gate's rows come before up's, and a tile has BLOCK_N // 2
    columns of each. With INTERLEAVED the rows alternate. Grid (any,), persistent: a program's
    groups own its tiles pid, pid + grid size, ... in turn. Needs the schedule, and writes the rows
    of its tiles only: z (M, N) with STORE_Z, h (M, width) with STORE_H. A block of their
    descriptors has BLOCK_N // (2 * SUBTILE) columns.
    """
    BLOCK_I: gl.constexpr = BLOCK_N // 2
    COLS: gl.constexpr = BLOCK_I // SUBTILE
    B_SHAPE: gl.constexpr = [1, BLOCK_N, BLOCK_K] if INTERLEAVED else [1, 2, BLOCK_I, BLOCK_K]
    tiles_n = gl.cdiv(width, BLOCK_I)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SHAPE, b_desc.layout)
    # z and h share these buffers: their blocks are alike.
    buffers = gl.allocate_shared_memory(
        h_desc.dtype, [GROUPS * 2, 1, 1, BLOCK_M, 1, COLS], h_desc.layout
    )
    full, empty = new_ring(STAGES, 1)
    turns = new_turns()
    ring = (xs, bs, full, empty, tiles_ptr, max_tiles, tiles_n, K)
    gl.warp_specialize(
        [
            (
                _up_multiply,
                (
                    z_desc, h_desc, bias_ptr, width, limit, stride_bias_e, stride_bias_n, buffers,
                    ring, turns, 0, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, SUBTILE, ACTIVATION,
                    HAS_LIMIT, HAS_BIAS, INTERLEAVED, STORE_Z, STORE_H,
                ),
            ),
            (
                _up_multiply,
                (
                    z_desc, h_desc, bias_ptr, width, limit, stride_bias_e, stride_bias_n, buffers,
                    ring, turns, 1, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, SUBTILE, ACTIVATION,
                    HAS_LIMIT, HAS_BIAS, INTERLEAVED, STORE_Z, STORE_H,
                ),
            ),
            (
                load_operands,
                (
                    x_desc, b_desc, ring, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, True, STAGES, 1,
                    not INTERLEAVED,
                ),
            ),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _load_chunk(z_desc, zs, loaded, slot, end, row, i0, NUM_BYTES: gl.constexpr):
    """Begin to load gate and up, from column i0 on, into the slot's two buffers."""
    barrier = loaded.index(slot)
    mbarrier.expect(barrier, NUM_BYTES)
    async_load(z_desc, [RAGGED_END, end, row, _GATE, i0], barrier, zs.index(slot * 2 + _GATE))
    async_load(z_desc, [RAGGED_END, end, row, _UP, i0], barrier, zs.index(slot * 2 + _UP))


@gluon.jit
def _activation_bwd(
    dh, gate, up, scale, limit, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr
):  # fmt: skip
    """Return the gradients of gate and up, the weighted h, and each row's <dh, h>."""
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
    """Compute one group's tiles of dh, and from them dz, sh and dots.

    z is loaded in chunks of columns, into SLOTS slots of buffers. dz leaves through the same ones.
    """
    # A slot serves an even number of chunks of a tile, so its barrier's phase is then 0 again.
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
        # Wait until the stores of the tile before have left the buffers.
        tma.store_wait(0)
        for c in gl.static_range(SLOTS):
            slot = GROUP * SLOTS + c
            _load_chunk(z_desc, zs, loaded, slot, end, row, i0 + c * COLS, NUM_BYTES)
        product = multiply_in_turn(
            ring, turns, turn, (turn * GROUPS + GROUP) * num_steps, num_steps,
            GROUP, False, B_IS_NK, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        routed = slots_of_rows(gather_ptr, first, end, BLOCK_M, True, row_layout)
        is_routed = (routed >= 0) & (routed < num_rows)
        scale = gl.full([BLOCK_M], 1.0, gl.float32, row_layout)
        if HAS_SCALE:
            scale = weights_of_slots(scale_ptr, routed, num_rows, top_k, stride_st, stride_sk)
        scale = scale.expand_dims(1)
        turn += 1
        # Other kernels round dh when they store it. Rounded here, it takes half of the registers.
        chunks = split_columns(product.to(z_desc.dtype), CHUNKS)
        dots = gl.zeros([BLOCK_M], gl.float32, row_layout)
        for c in gl.static_range(CHUNKS):
            slot = GROUP * SLOTS + c % SLOTS
            mbarrier.wait(loaded.index(slot), (c // SLOTS) % 2)
            gates = zs.index(slot * 2 + _GATE)
            ups = zs.index(slot * 2 + _UP)
            gate = split_columns(gates.reshape([BLOCK_M, COLS]).load(layout), 2)
            up = split_columns(ups.reshape([BLOCK_M, COLS]).load(layout), 2)
            dh = split_columns(chunks[c], 2)
            # One half after the other, since there are no registers for both.
            gate_0, up_0, h_0, dots_0 = _activation_bwd(
                dh[0], gate[0], up[0], scale, limit, ACTIVATION, HAS_LIMIT
            )
            gate_1, up_1, h_1, dots_1 = _activation_bwd(
                dh[1], gate[1], up[1], scale, limit, ACTIVATION, HAS_LIMIT
            )
            dots += dots_0 + dots_1
            gates.reshape([BLOCK_M, COLS]).store(join_columns(gate_0, gate_1))
            ups.reshape([BLOCK_M, COLS]).store(join_columns(up_0, up_1))
            if STORE_H:
                hs.index(slot).reshape([BLOCK_M, COLS]).store(join_columns(h_0, h_1))
            fence_async_shared()
            async_store(dz_desc, [RAGGED_END, end, row, _GATE, i0 + c * COLS], gates)
            async_store(dz_desc, [RAGGED_END, end, row, _UP, i0 + c * COLS], ups)
            if STORE_H:
                async_store(sh_desc, [RAGGED_END, end, row, 0, i0 + c * COLS], hs.index(slot))
            if c + 1 >= SLOTS and c + 1 < CHUNKS:
                # Wait for the last stores of the next slot. With two slots the other's may go on.
                tma.store_wait(STORES * (SLOTS - 1))
                next_slot = GROUP * SLOTS + (c + 1) % SLOTS
                next_i0 = i0 + (c + 1) * COLS
                _load_chunk(z_desc, zs, loaded, next_slot, end, row, next_i0, NUM_BYTES)
        if STORE_DOTS:
            gl.store(dots_ptr + tile_n.to(gl.int64) * num_rows + routed, dots, mask=is_routed)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles", "num_rows"])
def expert_down_bwd_pingpong_kernel(
    dy_desc, b_desc, z_desc, dz_desc, sh_desc, scale_ptr, gather_ptr, dots_ptr, tiles_ptr,
    max_tiles, num_rows, N, K, top_k, limit, stride_st, stride_sk,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    B_IS_NK: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SCALE: gl.constexpr,
    STORE_H: gl.constexpr, STORE_DOTS: gl.constexpr,
):  # fmt: skip
    """Compute dh[row] = dy[row] @ b[e], and from it what _expert_activation_bwd_kernel computes.

    dz (M, 2 * N) = scale * dh * act'(z), with gate and up in halves. sh (M, N) = scale * h.
    dots[column tile, slot] = <dh, h>, summed over the tile's columns. dh is not stored.

    Grid (any,), persistent: a program's groups own its tiles pid, pid + grid size, ... in turn.
    Needs the schedule, and zeros in dots. Writes the rows of the schedule's tiles only. A block of
    the descriptors of z, dz and sh has BLOCK_N // CHUNKS columns.
    """
    B_SHAPE: gl.constexpr = [1, BLOCK_N, BLOCK_K] if B_IS_NK else [1, BLOCK_K, BLOCK_N]
    COLS: gl.constexpr = BLOCK_N // CHUNKS
    tiles_n = gl.cdiv(N, BLOCK_N)
    xs = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], dy_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SHAPE, b_desc.layout)
    zs = gl.allocate_shared_memory(
        z_desc.dtype, [GROUPS * SLOTS * 2, 1, 1, BLOCK_M, 1, COLS], z_desc.layout
    )
    # Without h nothing uses its buffers.
    hs = zs
    if STORE_H:
        hs = gl.allocate_shared_memory(
            z_desc.dtype, [GROUPS * SLOTS, 1, 1, BLOCK_M, 1, COLS], z_desc.layout
        )
    loaded = gl.allocate_shared_memory(gl.int64, [GROUPS * SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(GROUPS * SLOTS):
        mbarrier.init(loaded.index(slot), count=1)
    full, empty = new_ring(STAGES, 1)
    turns = new_turns()
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
