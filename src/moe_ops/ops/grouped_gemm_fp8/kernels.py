# SPDX-License-Identifier: Apache-2.0
"""Compute grouped_gemm_fp8 and its dX in one kernel.

M, N, K are a GEMM's, as in _triton/kernels/grouped_gemm.py: y (M, N) = x (M, K) @ b[e] (K, N). b is
float8_e4m3fn, read as uint8. On GPUs without FP8 (compute capability below 8.9), and in Triton's
interpreter, the kernel decodes the bits itself.
"""

import triton
import triton.language as tl

from moe_ops._triton.kernels.dequantize import decode_e4m3
from moe_ops._triton.kernels.grouped_gemm import (
    finish_tile,
    follow_on,
    load_b,
    load_x,
    source_rows,
)
from moe_ops._triton.kernels.schedule import begin_walk, walked_tile, zero_tail


@triton.jit
def multiply_fp8(
    x_ptr, x_desc, b_ptr, b_desc, b_scale_ptr, source, in_source, first, e, cols, in_cols, n0, K,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_se, stride_sk, stride_sn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA_X: tl.constexpr, TMA_B: tl.constexpr, B_IS_NK: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Return x[source] @ (b[e] * b_scale[e])[:, cols] in fp32, (BLOCK_M, BLOCK_N).

    Each 128 x 128 of b have one scale. BLOCK_N and BLOCK_K divide 128, so a step has one scale. It
    multiplies the step's fp32 product, whose operands are exact.
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
    scales = b_scale_ptr + e.to(tl.int64) * stride_se + (n0 // 128).to(tl.int64) * stride_sn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        scale = tl.load(scales + tl.cast(k0 // 128, tl.int64) * stride_sk)
        x = load_x(x_desc, x_pointers, first, k0, in_source, k0 + k < K, TMA_X, EVEN_K)
        b = load_b(
            b_desc, b_pointers, e, n0, k0, in_cols, k0 + k < K,
            TMA_B, B_IS_NK, False, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc += tl.dot(x, decode_e4m3(b, HAS_FP8).to(x.dtype), input_precision=PRECISION) * scale
        x_pointers += tl.cast(stride_xk, tl.int64) * BLOCK_K
        b_pointers += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return acc


@triton.jit(do_not_specialize=["max_tiles", "num_rows"])
def grouped_gemm_fp8_kernel(
    x_ptr, x_desc, b_ptr, b_desc, b_scale_ptr, scale_ptr, gather_ptr,
    y_ptr, y_desc, other_ptr, dots_ptr, counts_ptr, tiles_ptr,
    max_tiles, num_rows, num_experts, N, K, top_k, x_divisor, other_divisor,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_se, stride_sk, stride_sn,
    stride_wt, stride_wk, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA_X: tl.constexpr, TMA_B: tl.constexpr, TMA_Y: tl.constexpr, B_IS_NK: tl.constexpr,
    EVEN_K: tl.constexpr, GATHER_X: tl.constexpr, SCATTER_Y: tl.constexpr,
    HAS_GATHER: tl.constexpr, HAS_SCALE: tl.constexpr,
    STORE_Y: tl.constexpr, HAS_DOTS: tl.constexpr, GATHER_OTHER: tl.constexpr,
    FINDS_TILES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_W: tl.constexpr,
    FLATTEN: tl.constexpr, SUBTILE: tl.constexpr, PDL: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Compute y[row] = scale * (x[row] @ (b[e] * b_scale[e])), tile by tile.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... The schedule, the
    dots and the rows of no expert are as in grouped_gemm_kernel.
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
        rows = first + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < end
        in_cols = cols < N
        source, in_source = source_rows(gather_ptr, rows, in_rows, num_rows, x_divisor, GATHER_X)
        acc = multiply_fp8(
            x_ptr, x_desc, b_ptr, b_desc, b_scale_ptr, source, in_source, first, e, cols, in_cols,
            tile_n * BLOCK_N, K,
            stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_se, stride_sk, stride_sn,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA_X, TMA_B, B_IS_NK, EVEN_K, HAS_FP8,
        )  # fmt: skip
        finish_tile(
            acc, rows, cols, in_rows, in_cols, scale_ptr, gather_ptr, y_ptr, y_desc,
            other_ptr, dots_ptr, first, end, tile_n, num_rows, N, top_k, other_divisor,
            stride_wt, stride_wk, stride_om, stride_on,
            BLOCK_M, BLOCK_N, TMA_Y, SCATTER_Y, HAS_GATHER, HAS_SCALE, STORE_Y, HAS_DOTS,
            GATHER_OTHER, SUBTILE,
        )  # fmt: skip
