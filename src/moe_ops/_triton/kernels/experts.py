# SPDX-License-Identifier: Apache-2.0
"""Compute the up projection of fused_experts with its activation, and the activation's backward.

M routed rows in expert order, K hidden_size, width intermediate_size, W columns of the up
projection: 2 * width with a gate, else width. z (M, W) is the pre-activation, h (M, width) the
activation's output. The index i counts the columns of h, w and n those of z; e is an expert, t the
position of a tile.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices

from moe_ops._triton.kernels.activations import gated_activation, plain_activation, split_gate
from moe_ops._triton.kernels.dependent_launch import follow_on
from moe_ops._triton.kernels.grouped_gemm import (
    halves_of,
    multiply,
    source_rows,
)
from moe_ops._triton.kernels.schedule import begin_walk, walked_tile, zero_tail


@triton.jit
def _store_part(
    ptr, desc, tile, first, end, part, n0,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Store a tile (BLOCK_M, BLOCK_N) at [first:end, part, n0:] of a ragged descriptor (M, any, N).

    The pointer is read for its dtype only, which is the descriptor's.
    """
    # This is triton.tools' store_ragged, which Triton's interpreter does not run.
    r0, r1, row = to_ragged_indices(first, end - first, 0)
    if SUBTILE == 2:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of(tile, BLOCK_M, BLOCK_N)
        left = left.to(ptr.dtype.element_ty).reshape(1, 1, BLOCK_M, 1, HALF)
        desc.store([r0, r1, row, part, n0], left)
        right = right.to(ptr.dtype.element_ty).reshape(1, 1, BLOCK_M, 1, HALF)
        desc.store([r0, r1, row, part, n0 + HALF], right)
    else:
        tile = tile.to(ptr.dtype.element_ty).reshape(1, 1, BLOCK_M, 1, BLOCK_N)
        desc.store([r0, r1, row, part, n0], tile)


@triton.jit
def _store_h(
    h_ptr, h_desc, h, rows, in_rows, first, end, i0, width, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store h (BLOCK_M, BLOCK_I) from column i0 on."""
    if TMA:
        _store_part(h_ptr, h_desc, h, first, end, 0, i0, BLOCK_M, BLOCK_I, 1)
    else:
        i = i0 + tl.arange(0, BLOCK_I)
        pointers = h_ptr + rows[:, None].to(tl.int64) * stride_h + i[None, :]
        in_h = in_rows & (i < width)[None, :]
        tl.store(pointers, h.to(h_ptr.dtype.element_ty), mask=in_h)


@triton.jit
def _activate(
    gate, up, limit, GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr
):  # fmt: skip
    """Return act(gate) * up, or without a gate act(gate)."""
    if GATED:
        h, _, _ = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
    else:
        h, _ = plain_activation(gate, limit, ACTIVATION, HAS_LIMIT)
    return h


@triton.jit(do_not_specialize=["max_tiles", "num_rows"])
def _expert_up_kernel(
    x_ptr, x_desc, b_ptr, b_desc, bias_ptr, gather_ptr, z_ptr, z_desc, h_ptr, h_desc,
    counts_ptr, tiles_ptr, max_tiles, num_rows, num_experts, width, K, x_divisor, limit,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    stride_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, TMA_X: tl.constexpr, TMA_B: tl.constexpr, TMA_Z: tl.constexpr,
    TMA_H: tl.constexpr, B_IS_NK: tl.constexpr, EVEN_K: tl.constexpr, GATHER_X: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr, STORE_Z: tl.constexpr,
    STORE_H: tl.constexpr, FINDS_TILES: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_W: tl.constexpr, FLATTEN: tl.constexpr, SUBTILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute z[row] = x[row] @ b[e] + bias[e] and h[row] = act(z[row]), tile by tile.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... A tile has BLOCK_N
    columns of z. With GATED these are BLOCK_N // 2 columns of gate and the same columns of up, so
    it has BLOCK_N // 2 columns of h. Needs the schedule or, with FINDS_TILES, only the counts.
    Rows of no expert are not written; with FINDS_TILES those of z are zeroed.
    """
    if PDL:
        follow_on()
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    BLOCK_I: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    W = 2 * width if GATED else width
    tiles_n = tl.cdiv(width, BLOCK_I)
    tiles_m, walk = begin_walk(
        counts_ptr, tiles_ptr, max_tiles, num_rows, num_experts, BLOCK_M, EXPERTS, FINDS_TILES
    )
    if FINDS_TILES and STORE_Z:
        zero_tail(z_ptr, gather_ptr, tl.max(walk[1], 0), num_rows, W, False, BLOCK_W)
    for t in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
        flatten=FLATTEN,
    ):  # fmt: skip
        e, first, end, tile_n = walked_tile(
            t, tiles_m, tiles_n, walk, GROUP_M, BLOCK_M, EXPERTS, FINDS_TILES
        )
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        n = tl.arange(0, BLOCK_N)
        if HALVES:
            n0 = tile_n * BLOCK_I
            cols = (n // BLOCK_I) * width + n0 + n % BLOCK_I
            in_cols = n0 + n % BLOCK_I < width
        else:
            n0 = tile_n * BLOCK_N
            cols = n0 + n
            in_cols = cols < W
        source, in_source = source_rows(gather_ptr, rows, in_rows, num_rows, x_divisor, GATHER_X)
        z = multiply(
            x_ptr, x_desc, b_ptr, b_desc, bias_ptr, source, in_source, first, e, cols, in_cols,
            n0, K,
            stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA_X, TMA_B, B_IS_NK, HALVES, EVEN_K, HAS_BIAS,
        )  # fmt: skip
        in_h = in_rows[:, None]
        if STORE_Z:
            if TMA_Z and GATED:
                # The halves go through the same buffer, one after the other.
                left, right = halves_of(z, BLOCK_M, BLOCK_N)
                _store_part(z_ptr, z_desc, left, first, end, 0, n0, BLOCK_M, BLOCK_I, 1)
                if HALVES:
                    _store_part(z_ptr, z_desc, right, first, end, 1, n0, BLOCK_M, BLOCK_I, 1)
                else:
                    n1 = n0 + BLOCK_I
                    _store_part(z_ptr, z_desc, right, first, end, 0, n1, BLOCK_M, BLOCK_I, 1)
            elif TMA_Z:
                _store_part(z_ptr, z_desc, z, first, end, 0, n0, BLOCK_M, BLOCK_N, SUBTILE)
            else:
                z_pointers = z_ptr + rows[:, None].to(tl.int64) * W + cols[None, :]
                in_z = in_h & in_cols[None, :]
                tl.store(z_pointers, z.to(z_ptr.dtype.element_ty), mask=in_z)
        if STORE_H:
            gate = z
            up = z
            if GATED:
                gate, up = split_gate(z, BLOCK_M, BLOCK_I, INTERLEAVED)
            i0 = tile_n * BLOCK_I
            if SUBTILE == 2:
                # One half after the other takes fewer registers at a time.
                HALF: tl.constexpr = BLOCK_I // 2
                gate, gate_right = halves_of(gate, BLOCK_M, BLOCK_I)
                up, up_right = halves_of(up, BLOCK_M, BLOCK_I)
                h = _activate(gate, up, limit, GATED, ACTIVATION, HAS_LIMIT)
                _store_h(
                    h_ptr, h_desc, h, rows, in_h, first, end, i0, width, stride_h,
                    BLOCK_M, HALF, TMA_H,
                )  # fmt: skip
                h = _activate(gate_right, up_right, limit, GATED, ACTIVATION, HAS_LIMIT)
                i0 += HALF
                _store_h(
                    h_ptr, h_desc, h, rows, in_h, first, end, i0, width, stride_h,
                    BLOCK_M, HALF, TMA_H,
                )  # fmt: skip
            else:
                h = _activate(gate, up, limit, GATED, ACTIVATION, HAS_LIMIT)
                _store_h(
                    h_ptr, h_desc, h, rows, in_h, first, end, i0, width, stride_h,
                    BLOCK_M, BLOCK_I, TMA_H,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _expert_activation_bwd_kernel(
    dh_ptr, z_ptr, scale_ptr, gather_ptr, used_ptr, dz_ptr, sh_ptr, dots_ptr,
    num_rows, width, top_k, limit, stride_st, stride_sk, stride_h,
    ROWS: tl.constexpr, BLOCK_I: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_SCALE: tl.constexpr,
    LOAD_DH: tl.constexpr, STORE_DZ: tl.constexpr, STORE_H: tl.constexpr,
    STORE_DOTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute dz = s * dh * act'(z), sh = s * h and dots[slot] = <dh, h> of each row.

    s is the router weight of the row's slot, or 1 without HAS_SCALE. Without LOAD_DH only sh is
    made. Grid (cdiv(num_rows, ROWS),): one program owns ROWS rows. Needs nothing initialised. Rows
    from used_ptr[0] on belong to no expert: their dz and dots are zeros, their sh is not written.
    sh may be dh itself, since a block is read before it is written. width and the stride of the
    rows of dh and sh are in units (rows.py).
    """
    width *= UNIT
    stride_h *= UNIT
    W = 2 * width if GATED else width
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    slots = tl.load(gather_ptr + rows, mask=in_rows, other=-1)
    in_slots = in_rows & (slots >= 0) & (slots < num_rows)
    is_used = in_slots & (rows < tl.load(used_ptr))
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_SCALE:
        scale_pointers = (
            scale_ptr
            + (slots // top_k).to(tl.int64) * stride_st
            + (slots % top_k).to(tl.int64) * stride_sk
        )
        scale = tl.load(scale_pointers, mask=is_used, other=0).to(tl.float32)
    dots = tl.zeros((ROWS,), tl.float32)
    h_rows = rows[:, None].to(tl.int64) * stride_h
    z_rows = rows[:, None].to(tl.int64) * W
    for i0 in tl.range(0, width, BLOCK_I, num_stages=3):
        i = i0 + tl.arange(0, BLOCK_I)
        mask = is_used[:, None] & (i < width)[None, :]
        if LOAD_DH:
            dh = tl.load(dh_ptr + h_rows + i[None, :], mask=mask, other=0).to(tl.float32)
        if GATED and INTERLEAVED:
            w = 2 * i0 + tl.arange(0, 2 * BLOCK_I)
            in_w = is_used[:, None] & (w < W)[None, :]
            z = tl.load(z_ptr + z_rows + w[None, :], mask=in_w, other=0).to(tl.float32)
            gate, up = split_gate(z, ROWS, BLOCK_I, True)
            h, d_gate, d_up = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
        elif GATED:
            gate = tl.load(z_ptr + z_rows + i[None, :], mask=mask, other=0).to(tl.float32)
            up = tl.load(z_ptr + z_rows + width + i[None, :], mask=mask, other=0).to(tl.float32)
            h, d_gate, d_up = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
        else:
            z = tl.load(z_ptr + z_rows + i[None, :], mask=mask, other=0).to(tl.float32)
            h, d_z = plain_activation(z, limit, ACTIVATION, HAS_LIMIT)
        if STORE_DOTS:
            dots += tl.sum(tl.where(mask, dh * h, 0.0), 1)
        if STORE_H:
            sh = (h * scale[:, None]).to(sh_ptr.dtype.element_ty)
            tl.store(sh_ptr + h_rows + i[None, :], sh, mask=mask)
        if STORE_DZ:
            # Where nothing was loaded, dh and so dz are zero.
            dh *= scale[:, None]
            stored = in_rows[:, None] & (i < width)[None, :]
            if GATED and INTERLEAVED:
                dz = tl.join(dh * d_gate, dh * d_up).reshape(ROWS, 2 * BLOCK_I)
                dz = dz.to(dz_ptr.dtype.element_ty)
                in_w = in_rows[:, None] & (w < W)[None, :]
                tl.store(dz_ptr + z_rows + w[None, :], dz, mask=in_w)
            elif GATED:
                out = dz_ptr + z_rows + i[None, :]
                tl.store(out, (dh * d_gate).to(dz_ptr.dtype.element_ty), mask=stored)
                tl.store(out + width, (dh * d_up).to(dz_ptr.dtype.element_ty), mask=stored)
            else:
                dz = (dh * d_z).to(dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + z_rows + i[None, :], dz, mask=stored)
    if STORE_DOTS:
        tl.store(dots_ptr + slots, dots.to(dots_ptr.dtype.element_ty), mask=in_slots)
