# SPDX-License-Identifier: Apache-2.0
"""What an adapter has beside grouped GEMMs: a thin product is added to what another has stored."""

import triton
import triton.language as tl

from moe_ops._triton.kernels.schedule import begin_walk, walked_tile


@triton.jit(do_not_specialize=["max_tiles", "num_rows"])
def add_low_rank_kernel(
    low_ptr, factor_ptr, y_ptr, counts_ptr, tiles_ptr,
    max_tiles, num_rows, num_experts, N, L, stride_fe, stride_fl, stride_fn, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS: tl.constexpr, FINDS_TILES: tl.constexpr,
):  # fmt: skip
    """Add low[row] @ factor[e] to y[row], tile by tile.

    low (M, L) is contiguous, factor (E, L, N) has any strides, the rows of y (M, N) are dense. Grid
    (any,), persistent: a program owns the tiles pid, pid + grid size, ... Rows of no expert stay as
    they are.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m, walk = begin_walk(
        counts_ptr, tiles_ptr, max_tiles, num_rows, num_experts, BLOCK_M, EXPERTS, FINDS_TILES
    )
    ranks = tl.arange(0, BLOCK_L)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        e, first, end, tile_n = walked_tile(
            t, tiles_m, tiles_n, walk, GROUP_M, BLOCK_M, EXPERTS, FINDS_TILES
        )
        rows = first + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < end
        in_tile = in_rows[:, None] & (cols < N)[None, :]
        y_pointers = y_ptr + rows[:, None].to(tl.int64) * stride_ym + cols[None, :]
        acc = tl.load(y_pointers, mask=in_tile, other=0).to(tl.float32)
        factor = factor_ptr + e.to(tl.int64) * stride_fe + cols[None, :].to(tl.int64) * stride_fn
        for l0 in range(0, L, BLOCK_L):
            in_rank = l0 + ranks < L
            low = tl.load(
                low_ptr + rows[:, None].to(tl.int64) * L + l0 + ranks[None, :],
                mask=in_rows[:, None] & in_rank[None, :], other=0,
            )  # fmt: skip
            of_expert = tl.load(
                factor + (l0 + ranks)[:, None].to(tl.int64) * stride_fl,
                mask=in_rank[:, None] & (cols < N)[None, :], other=0,
            )  # fmt: skip
            acc = tl.dot(low, of_expert, acc, input_precision=PRECISION)
        tl.store(y_pointers, acc.to(y_ptr.dtype.element_ty), mask=in_tile)
