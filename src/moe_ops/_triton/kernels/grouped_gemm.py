# SPDX-License-Identifier: Apache-2.0
"""Multiply each expert's rows by its matrix: grouped_gemm and its dX, and the parts others share.

The letters are a GEMM's. Each expert e multiplies its rows: y (M, N) = x (M, K) @ b[e] (K, N).
Forward: M rows, N out_features, K in_features, b[e] = weight[e].T. dX: N in_features, K
out_features, b[e] = weight[e]. So dX is the same kernel with other strides. dW is in
grouped_gemm_dw.py.

A kernel walks tiles (walked_tile), multiplies (multiply), and finishes each tile in its own way.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices

from moe_ops._triton.kernels.dependent_launch import follow_on
from moe_ops._triton.kernels.schedule import begin_walk, walked_tile, zero_tail


@triton.jit
def load_x(
    desc, pointers, row, k0, in_rows, in_k, TMA: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """Load the next (BLOCK_M, BLOCK_K) of x; past K it is zero.

    Past the tile's rows, pointers give zeros and a descriptor gives any values.
    """
    if TMA:
        x = desc.load([row, k0])
    elif EVEN_K:
        x = tl.load(pointers, mask=in_rows[:, None], other=0)
    else:
        x = tl.load(pointers, mask=in_rows[:, None] & in_k[None, :], other=0)
    return x


@triton.jit
def load_b(
    desc, pointers, e, n0, k0, in_cols, in_k,
    TMA: tl.constexpr, IS_NK: tl.constexpr, HALVES: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the next (BLOCK_K, BLOCK_N) of b[e]; past K and N it is zero.

    With HALVES, half of the columns come from the first half of N, half from the second. Both
    begin at n0 of their half.
    """
    if TMA and HALVES and IS_NK:
        b = desc.load([e, 0, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
    elif TMA and HALVES:
        b = desc.load([e, k0, 0, n0]).reshape(BLOCK_K, BLOCK_N)
    elif TMA and IS_NK:
        b = desc.load([e, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
    elif TMA:
        b = desc.load([e, k0, n0]).reshape(BLOCK_K, BLOCK_N)
    elif EVEN_K:
        b = tl.load(pointers, mask=in_cols[None, :], other=0)
    else:
        b = tl.load(pointers, mask=in_k[:, None] & in_cols[None, :], other=0)
    return b


@triton.jit
def multiply(
    x_ptr, x_desc, b_ptr, b_desc, bias_ptr, source, in_source, first, e, cols, in_cols, n0, K,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA_X: tl.constexpr, TMA_B: tl.constexpr, B_IS_NK: tl.constexpr, HALVES: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return x[source] @ b[e][:, cols] + bias[e, cols] in fp32, (BLOCK_M, BLOCK_N).

    Pointers load the rows `source` and the columns `cols`. Descriptors load BLOCK_M rows from
    `first` on, and columns from n0 on (see load_b).
    """
    k = tl.arange(0, BLOCK_K)
    # If a descriptor loads, these pointers are dead code.
    x_pointers = (
        x_ptr + source[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
    )
    b_pointers = (
        b_ptr
        + e.to(tl.int64) * stride_be
        + k[:, None].to(tl.int64) * stride_bk
        + cols[None, :].to(tl.int64) * stride_bn
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        # The bias is not added after the loop: all registers are taken there.
        bias_pointers = (
            bias_ptr + e.to(tl.int64) * stride_bias_e + cols.to(tl.int64) * stride_bias_n
        )
        acc += tl.load(bias_pointers, mask=in_cols, other=0).to(tl.float32)[None, :]
    for k0 in range(0, K, BLOCK_K):
        x = load_x(x_desc, x_pointers, first, k0, in_source, k0 + k < K, TMA_X, EVEN_K)
        b = load_b(
            b_desc, b_pointers, e, n0, k0, in_cols, k0 + k < K,
            TMA_B, B_IS_NK, HALVES, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(x, b, acc, input_precision=PRECISION)
        x_pointers += tl.cast(stride_xk, tl.int64) * BLOCK_K
        b_pointers += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return acc


@triton.jit
def halves_of(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split a tile (BLOCK_M, BLOCK_N) into its left and its right half."""
    left, right = tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def source_rows(
    gather_ptr, rows, in_rows, num_rows, divisor, GATHER: tl.constexpr
):  # fmt: skip
    """Return the row of x that each row multiplies, and whether there is one."""
    source = rows
    in_source = in_rows
    if GATHER:
        source = tl.load(gather_ptr + rows, mask=in_rows, other=-1)
        in_source = in_rows & (source >= 0) & (source < num_rows)
        source //= divisor
    return source, in_source


@triton.jit
def store_rows(
    y_ptr, y_desc, y, first, end, target, in_target, n0, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store y (BLOCK_M, BLOCK_N) from column n0 on.

    A descriptor stores to the rows from `first` up to `end`, pointers store to the rows `target`.
    """
    if TMA:
        # This is triton.tools' store_ragged, which Triton's interpreter does not run.
        i0, i1, row = to_ragged_indices(first, end - first, 0)
        y_desc.store([i0, i1, row, n0], y.reshape(1, 1, BLOCK_M, BLOCK_N))
    else:
        cols = n0 + tl.arange(0, BLOCK_N)
        y_pointers = y_ptr + target[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(y_pointers, y, mask=in_target[:, None] & (cols < N)[None, :])


@triton.jit
def finish_tile(
    acc, rows, cols, in_rows, in_cols, scale_ptr, gather_ptr, y_ptr, y_desc, other_ptr, dots_ptr,
    first, end, tile_n, num_rows, N, top_k, other_divisor,
    stride_st, stride_sk, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA_Y: tl.constexpr, SCATTER_Y: tl.constexpr,
    HAS_GATHER: tl.constexpr, HAS_SCALE: tl.constexpr, STORE_Y: tl.constexpr,
    HAS_DOTS: tl.constexpr, GATHER_OTHER: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Finish a product acc (BLOCK_M, BLOCK_N): take its dots with `other`, scale it, store y."""
    # The slots are not loaded before the product: its loop takes all registers.
    slots = rows
    if HAS_GATHER:
        slots = tl.load(gather_ptr + rows, mask=in_rows, other=-1)
    in_slots = in_rows & (slots >= 0) & (slots < num_rows)
    if HAS_DOTS:
        other_rows = rows
        if GATHER_OTHER:
            other_rows = slots // other_divisor
        other_pointers = (
            other_ptr
            + other_rows[:, None].to(tl.int64) * stride_om
            + cols[None, :].to(tl.int64) * stride_on
        )
        in_tile = in_slots[:, None] & in_cols[None, :]
        other = tl.load(other_pointers, mask=in_tile, other=0).to(tl.float32)
        dots = tl.sum(acc * other, 1)
        tl.store(dots_ptr + tile_n.to(tl.int64) * num_rows + slots, dots, mask=in_slots)
    if STORE_Y:
        if HAS_SCALE:
            scale_pointers = (
                scale_ptr
                + (slots // top_k).to(tl.int64) * stride_st
                + (slots % top_k).to(tl.int64) * stride_sk
            )
            acc *= tl.load(scale_pointers, mask=in_slots, other=0).to(tl.float32)[:, None]
        y = acc.to(y_ptr.dtype.element_ty)
        target = rows
        in_target = in_rows
        if SCATTER_Y:
            target = slots
            in_target = in_slots
        n0 = tile_n * BLOCK_N
        if SUBTILE == 2:
            left, right = halves_of(y, BLOCK_M, BLOCK_N)
            HALF: tl.constexpr = BLOCK_N // 2
            store_rows(
                y_ptr, y_desc, left, first, end, target, in_target, n0, N, BLOCK_M, HALF, TMA_Y
            )
            n0 += HALF
            store_rows(
                y_ptr, y_desc, right, first, end, target, in_target, n0, N, BLOCK_M, HALF, TMA_Y
            )
        else:
            store_rows(
                y_ptr, y_desc, y, first, end, target, in_target, n0, N, BLOCK_M, BLOCK_N, TMA_Y
            )


@triton.jit
def grouped_gemm_tile(
    x_ptr, x_desc, b_ptr, b_desc, bias_ptr, scale_ptr, gather_ptr, y_ptr, y_desc,
    other_ptr, dots_ptr, e, first, end, tile_n, num_rows, N, K, top_k, x_divisor, other_divisor,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    stride_st, stride_sk, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA_X: tl.constexpr, TMA_B: tl.constexpr, TMA_Y: tl.constexpr, B_IS_NK: tl.constexpr,
    EVEN_K: tl.constexpr, GATHER_X: tl.constexpr, SCATTER_Y: tl.constexpr,
    HAS_GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    STORE_Y: tl.constexpr, HAS_DOTS: tl.constexpr, GATHER_OTHER: tl.constexpr,
    SUBTILE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of grouped_gemm_kernel: BLOCK_M rows or fewer from `first`, column tile_n."""
    rows = first + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < end
    in_cols = cols < N
    source, in_source = source_rows(gather_ptr, rows, in_rows, num_rows, x_divisor, GATHER_X)
    acc = multiply(
        x_ptr, x_desc, b_ptr, b_desc, bias_ptr, source, in_source, first, e, cols, in_cols,
        tile_n * BLOCK_N, K,
        stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA_X, TMA_B, B_IS_NK, False, EVEN_K, HAS_BIAS,
    )  # fmt: skip
    finish_tile(
        acc, rows, cols, in_rows, in_cols, scale_ptr, gather_ptr, y_ptr, y_desc, other_ptr, dots_ptr,
        first, end, tile_n, num_rows, N, top_k, other_divisor,
        stride_st, stride_sk, stride_om, stride_on,
        BLOCK_M, BLOCK_N, TMA_Y, SCATTER_Y, HAS_GATHER, HAS_SCALE, STORE_Y, HAS_DOTS, GATHER_OTHER,
        SUBTILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_tiles", "num_rows"])
def grouped_gemm_kernel(
    x_ptr, x_desc, x_tail_desc, b_ptr, b_desc, bias_ptr, scale_ptr, gather_ptr,
    y_ptr, y_desc, y_tail_desc, other_ptr, dots_ptr, counts_ptr, tiles_ptr,
    max_tiles, num_rows, num_experts, N, K, top_k, x_divisor, other_divisor,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    stride_st, stride_sk, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA_X: tl.constexpr, TMA_B: tl.constexpr, TMA_Y: tl.constexpr, B_IS_NK: tl.constexpr,
    EVEN_K: tl.constexpr, GATHER_X: tl.constexpr, SCATTER_Y: tl.constexpr,
    HAS_GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    STORE_Y: tl.constexpr, HAS_DOTS: tl.constexpr, GATHER_OTHER: tl.constexpr,
    FINDS_TILES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_W: tl.constexpr,
    TAIL_TILES: tl.constexpr, FLATTEN: tl.constexpr, SUBTILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y[row] = scale * (x[row] @ b[e] + bias[e]), tile by tile.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... With HAS_DOTS it
    also writes dots[column tile, slot] = <x[row] @ b[e], other[row]>, summed over the tile's
    columns. Needs a schedule, and writes the rows of its tiles only. With FINDS_TILES it needs no
    schedule, and zeros the rows of no expert itself. With TAIL_TILES an expert's last rows get a
    tile of half the height if they fit. dots must hold zeros: rows without a slot write none.
    """
    if PDL:
        follow_on()
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m, walk = begin_walk(
        counts_ptr, tiles_ptr, max_tiles, num_rows, num_experts, BLOCK_M, EXPERTS, FINDS_TILES
    )
    if FINDS_TILES and STORE_Y:
        zero_tail(y_ptr, gather_ptr, tl.max(walk[1], 0), num_rows, N, SCATTER_Y, BLOCK_W)
    for t in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
        flatten=FLATTEN,
    ):  # fmt: skip
        e, first, end, tile_n = walked_tile(
            t, tiles_m, tiles_n, walk, GROUP_M, BLOCK_M, EXPERTS, FINDS_TILES
        )
        if TAIL_TILES and end - first <= BLOCK_M // 2:
            grouped_gemm_tile(
                x_ptr, x_tail_desc, b_ptr, b_desc, bias_ptr, scale_ptr, gather_ptr,
                y_ptr, y_tail_desc, other_ptr, dots_ptr, e, first, end, tile_n,
                num_rows, N, K, top_k, x_divisor, other_divisor,
                stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
                stride_st, stride_sk, stride_om, stride_on,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, PRECISION, TMA_X, TMA_B, TMA_Y, B_IS_NK, EVEN_K,
                GATHER_X, SCATTER_Y, HAS_GATHER, HAS_BIAS, HAS_SCALE, STORE_Y, HAS_DOTS,
                GATHER_OTHER, SUBTILE,
            )  # fmt: skip
        else:
            grouped_gemm_tile(
                x_ptr, x_desc, b_ptr, b_desc, bias_ptr, scale_ptr, gather_ptr,
                y_ptr, y_desc, other_ptr, dots_ptr, e, first, end, tile_n,
                num_rows, N, K, top_k, x_divisor, other_divisor,
                stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
                stride_st, stride_sk, stride_om, stride_on,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA_X, TMA_B, TMA_Y, B_IS_NK, EVEN_K,
                GATHER_X, SCATTER_Y, HAS_GATHER, HAS_BIAS, HAS_SCALE, STORE_Y, HAS_DOTS,
                GATHER_OTHER, SUBTILE,
            )  # fmt: skip
