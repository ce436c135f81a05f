# SPDX-License-Identifier: Apache-2.0
"""Make the tile schedule of a grouped GEMM: the expert and the rows of each tile.

The device makes it from token_counts, so the host reads nothing. E experts, R rows, e an expert,
t the position of a tile (m, n) in the walk. A schedule is int32 (3 * max_tiles + 2,). It holds the
experts of all tiles, their first rows and their end rows, in expert order. Then come the number of
tiles and the number of rows that belong to an expert. max_tiles = cdiv(R, BLOCK_M) + E is enough
for any counts.

A GEMM of few rows finds its tiles itself (find_tile), which saves a launch.
"""

import triton
import triton.language as tl


@triton.jit
def expert_rows(counts_ptr, num_rows, num_experts, EXPERTS: tl.constexpr):
    """Return every expert's first row and end row, both clamped to num_rows."""
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0).to(tl.int64)
    counts = tl.minimum(tl.maximum(counts, 0), num_rows)
    ends = tl.cumsum(counts, 0)
    starts = tl.minimum(ends - counts, num_rows).to(tl.int32)
    return starts, tl.minimum(ends, num_rows).to(tl.int32)


@triton.jit
def tiles_before(starts, ends, BLOCK_M: tl.constexpr):
    """Return every expert's number of tiles, and their running sum, its own included."""
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(tile, starts, ends, tiles, upto, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Return a tile's expert, first row and end row, given expert_rows and tiles_before."""
    e = tl.sum((upto <= tile).to(tl.int32))
    is_mine = tl.arange(0, EXPERTS) == e
    first = tl.sum(tl.where(is_mine, starts + (tile - upto + tiles) * BLOCK_M, 0))
    return e, first, tl.sum(tl.where(is_mine, ends, 0))


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile (m, n) of position t.

    GROUP_M neighbouring row tiles share their weight columns in the L2 cache.
    """
    width = GROUP_M * tiles_n
    first_m = (t // width) * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (t % width) % size_m, (t % width) // size_m


@triton.jit
def begin_walk(
    counts_ptr, tiles_ptr, max_tiles, num_rows, num_experts,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, FINDS_TILES: tl.constexpr,
):  # fmt: skip
    """Return the number of row tiles, and the walk that walked_tile reads.

    With FINDS_TILES the tiles are computed from the counts. Else the schedule holds them.
    """
    if FINDS_TILES:
        starts, ends = expert_rows(counts_ptr, num_rows, num_experts, EXPERTS)
        tiles, upto = tiles_before(starts, ends, BLOCK_M)
        tiles_m = tl.sum(tiles)
        walk = (starts, ends, tiles, upto)
    else:
        tiles_m = tl.load(tiles_ptr + 3 * max_tiles)
        walk = (tiles_ptr, max_tiles)  # type: ignore[assignment]
    return tiles_m, walk


@triton.jit
def walked_tile(
    t, tiles_m, tiles_n, walk,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, FINDS_TILES: tl.constexpr,
):  # fmt: skip
    """Return the expert, the first row, the end row and the column tile at position t."""
    tile_m, tile_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
    if FINDS_TILES:
        starts, ends, tiles, upto = walk
        e, first, end = find_tile(tile_m, starts, ends, tiles, upto, BLOCK_M, EXPERTS)
    else:
        tiles_ptr, max_tiles = walk
        e = tl.load(tiles_ptr + tile_m)
        first = tl.load(tiles_ptr + max_tiles + tile_m)
        end = tl.load(tiles_ptr + 2 * max_tiles + tile_m)
    return e, first, end, tile_n


@triton.jit
def zero_tail(
    output_ptr, rows_ptr, first, num_rows, width, SCATTER: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Zero the rows first, first + 1, ... of output; all programs of the launch share the work.

    With SCATTER row i is stored at rows[i].
    """
    for row in range(first + tl.program_id(0), num_rows, tl.num_programs(0)):
        target = tl.cast(row, tl.int64)
        if SCATTER:
            target = tl.load(rows_ptr + row).to(tl.int64)
        limit = tl.where((target >= 0) & (target < num_rows), width, 0)
        for w0 in range(0, width, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            zero = tl.zeros((BLOCK_W,), output_ptr.dtype.element_ty)
            tl.store(output_ptr + target * width + w, zero, mask=w < limit)


@triton.jit(do_not_specialize=["num_rows", "max_tiles", "first_expert", "end_expert"])
def tile_schedule_kernel(
    counts_ptr, tiles_ptr, output_ptr, rows_ptr, num_rows, num_experts, first_expert, end_expert,
    max_tiles, width,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_W: tl.constexpr,
    ZERO_TAIL: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Write the schedule; with ZERO_TAIL also zero the rows of output that belong to no expert.

    It has the tiles of the experts from first_expert up to end_expert, which it counts from 0.

    Grid (num_experts or more,): program e owns the tiles of expert e, and program 0 also writes
    their number. All programs share the rows to zero. Needs nothing initialised.
    """
    pid = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    starts, ends = expert_rows(counts_ptr, num_rows, num_experts, EXPERTS)
    tiles, _ = tiles_before(starts, ends, BLOCK_M)
    tiles = tl.where((experts >= first_expert) & (experts < end_expert), tiles, 0)
    start = tl.sum(tl.where(experts == pid, starts, 0))
    end = tl.sum(tl.where(experts == pid, ends, 0))
    first_tile = tl.sum(tl.where(experts < pid, tiles, 0))
    num_tiles = tl.sum(tl.where(experts == pid, tiles, 0))
    for i in range(num_tiles):
        tl.store(tiles_ptr + first_tile + i, pid - first_expert)
        tl.store(tiles_ptr + max_tiles + first_tile + i, start + i * BLOCK_M)
        tl.store(tiles_ptr + 2 * max_tiles + first_tile + i, end)
    if pid == 0:
        tl.store(tiles_ptr + 3 * max_tiles, tl.sum(tiles))
        tl.store(tiles_ptr + 3 * max_tiles + 1, tl.max(ends, 0))
    if ZERO_TAIL:
        zero_tail(output_ptr, rows_ptr, tl.max(ends, 0), num_rows, width, SCATTER, BLOCK_W)


@triton.jit(do_not_specialize=["num_rows"])
def expert_offsets_kernel(
    counts_ptr, offsets_ptr, num_rows, num_experts, EXPERTS: tl.constexpr
):  # fmt: skip
    """Write offsets (2, E), int32: every expert's first row and end row.

    Grid (1,): one program owns all experts. Needs nothing initialised.
    """
    experts = tl.arange(0, EXPERTS)
    starts, ends = expert_rows(counts_ptr, num_rows, num_experts, EXPERTS)
    tl.store(offsets_ptr + experts, starts, mask=experts < num_experts)
    tl.store(offsets_ptr + num_experts + experts, ends, mask=experts < num_experts)
