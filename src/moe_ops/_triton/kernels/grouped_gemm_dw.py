# SPDX-License-Identifier: Apache-2.0
"""Compute dW and dbias of grouped_gemm, and the bias's part of the router gradient.

M rows, N out_features, D in_features. dW contracts over an expert's rows: dw[e] is (N, D). If the
weight is stored (E, D, N), g and x change places, and N and D with them. e is an expert, t the
position of a tile, and offsets (2, E) holds the first row and the end row of each expert.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from moe_ops._triton.kernels.grouped_gemm import halves_of
from moe_ops._triton.kernels.schedule import tile_of


@triton.jit
def grouped_gemm_bwd_dw_kernel(
    g_ptr, g_desc, x_ptr, x_desc, dw_ptr, dw_desc, offsets_ptr, num_experts, N, D,
    stride_gm, stride_gn, stride_xm, stride_xd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, TMA_G: tl.constexpr, TMA_X: tl.constexpr, TMA_DW: tl.constexpr,
    FLATTEN: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Compute dw[e] (N, D) = sum over the rows m of expert e of outer(g[m], x[m]).

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... Needs nothing
    initialised and writes all of dw, zeros for an expert without rows. Rows past an expert's end
    are loaded as zeros: by the hardware with a ragged descriptor, by masks with pointers.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_d = tl.cdiv(D, BLOCK_D)
    for t in tl.range(
        tl.program_id(0), num_experts * tiles_n * tiles_d, tl.num_programs(0),
        flatten=FLATTEN,
    ):  # fmt: skip
        e = t // (tiles_n * tiles_d)
        tile_n, tile_d = tile_of(t % (tiles_n * tiles_d), tiles_n, tiles_d, GROUP)
        start = tl.load(offsets_ptr + e)
        end = tl.load(offsets_ptr + num_experts + e)
        n0 = tile_n * BLOCK_N
        d0 = tile_d * BLOCK_D
        n = n0 + tl.arange(0, BLOCK_N)
        d = d0 + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for m0 in tl.range(0, end - start, BLOCK_M):
            m = start + m0 + tl.arange(0, BLOCK_M)
            if TMA_G:
                g = load_ragged(g_desc, start, end - start, [m0, n0])
            else:
                g_pointers = (
                    g_ptr
                    + m[:, None].to(tl.int64) * stride_gm
                    + n[None, :].to(tl.int64) * stride_gn
                )
                g = tl.load(g_pointers, mask=(m < end)[:, None] & (n < N)[None, :], other=0)
            if TMA_X:
                x = load_ragged(x_desc, start, end - start, [m0, d0])
            else:
                x_pointers = (
                    x_ptr
                    + m[:, None].to(tl.int64) * stride_xm
                    + d[None, :].to(tl.int64) * stride_xd
                )
                x = tl.load(x_pointers, mask=(m < end)[:, None] & (d < D)[None, :], other=0)
            acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        dw = acc.to(dw_ptr.dtype.element_ty)
        if TMA_DW and SUBTILE == 2:
            left, right = halves_of(dw, BLOCK_N, BLOCK_D)
            dw_desc.store([e, n0, d0], left.reshape(1, BLOCK_N, BLOCK_D // 2))
            dw_desc.store([e, n0, d0 + BLOCK_D // 2], right.reshape(1, BLOCK_N, BLOCK_D // 2))
        elif TMA_DW:
            dw_desc.store([e, n0, d0], dw.reshape(1, BLOCK_N, BLOCK_D))
        else:
            pointers = dw_ptr + e.to(tl.int64) * N * D + n[:, None].to(tl.int64) * D + d[None, :]
            tl.store(pointers, dw, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def grouped_gemm_bwd_dbias_kernel(
    g_ptr, dbias_ptr, offsets_ptr, scale_ptr, gather_ptr, num_rows, num_experts, N, top_k,
    stride_gm, stride_gn, stride_st, stride_sk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATHER: tl.constexpr,
):  # fmt: skip
    """Compute dbias[e, n] = sum over the rows m of expert e of g[m, n], in fp32.

    With HAS_SCALE each row is multiplied by scale[slot]. Grid (num_experts, cdiv(N, BLOCK_N)): one
    program owns BLOCK_N columns of one expert. Needs nothing initialised and writes all of dbias,
    zeros for an expert without rows.
    """
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + num_experts + e)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m0 in tl.range(start, end, BLOCK_M, num_stages=3):
        m = m0 + tl.arange(0, BLOCK_M)
        in_rows = m < end
        pointers = g_ptr + m[:, None].to(tl.int64) * stride_gm + n[None, :].to(tl.int64) * stride_gn
        g = tl.load(pointers, mask=in_rows[:, None] & (n < N)[None, :], other=0).to(tl.float32)
        if HAS_SCALE:
            slots = m
            if HAS_GATHER:
                slots = tl.load(gather_ptr + m, mask=in_rows, other=-1)
            in_slots = in_rows & (slots >= 0) & (slots < num_rows)
            scale_pointers = (
                scale_ptr
                + (slots // top_k).to(tl.int64) * stride_st
                + (slots % top_k).to(tl.int64) * stride_sk
            )
            g *= tl.load(scale_pointers, mask=in_slots, other=0).to(tl.float32)[:, None]
        acc += g
    dbias = tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + e.to(tl.int64) * N + n, dbias, mask=n < N)


@triton.jit(do_not_specialize=["max_tiles", "num_rows"])
def grouped_gemm_bwd_bias_dots_kernel(
    g_ptr, gather_ptr, bias_ptr, dots_ptr, tiles_ptr, max_tiles, num_rows, N, g_divisor,
    stride_gm, stride_gn, stride_bias_e, stride_bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_GATHER: tl.constexpr,
    GATHER_G: tl.constexpr,
):  # fmt: skip
    """Compute dots[slot] = <g[row], bias[e]>: what the bias adds to the router gradient.

    Grid (max_tiles,): one program owns one tile of the schedule. dots must hold zeros: slots of no
    expert are not written.
    """
    tile = tl.program_id(0)
    if tile < tl.load(tiles_ptr + 3 * max_tiles):
        e = tl.load(tiles_ptr + tile).to(tl.int64)
        rows = tl.load(tiles_ptr + max_tiles + tile) + tl.arange(0, BLOCK_M)
        in_rows = rows < tl.load(tiles_ptr + 2 * max_tiles + tile)
        slots = rows
        if HAS_GATHER:
            slots = tl.load(gather_ptr + rows, mask=in_rows, other=-1)
        in_slots = in_rows & (slots >= 0) & (slots < num_rows)
        source = rows
        if GATHER_G:
            source = slots // g_divisor
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for n0 in tl.range(0, N, BLOCK_N, num_stages=3):
            n = n0 + tl.arange(0, BLOCK_N)
            bias = tl.load(
                bias_ptr + e * stride_bias_e + n.to(tl.int64) * stride_bias_n, mask=n < N, other=0
            )
            pointers = (
                g_ptr
                + source[:, None].to(tl.int64) * stride_gm
                + n[None, :].to(tl.int64) * stride_gn
            )
            g = tl.load(pointers, mask=in_slots[:, None] & (n < N)[None, :], other=0)
            acc += g.to(tl.float32) * bias.to(tl.float32)[None, :]
        tl.store(dots_ptr + slots, tl.sum(acc, 1), mask=in_slots)
