# SPDX-License-Identifier: Apache-2.0
"""Multiply each expert's rows by its quantised matrix, which is decoded inside the product.

For few rows: each tile of rows reads and decodes its weight again. There are three ways:

- sum_decoded: FMAs multiply one or two rows a tile by the numbers as they are decoded.
- dot_decoded: tensor cores multiply eight rows in bf16 by codes of four bits. They take the numbers
  from the registers of the threads that decoded them.
- multiply_decoded: tensor cores multiply 16 rows or more, of any dtype, by any codes. The numbers go
  through shared memory.

M, N, K are a GEMM's, as in grouped_gemm.py: y (M, N) = x (M, K) @ weight[e] (N, K).T. B bytes and G
blocks of a row of codes, width the columns of h.
"""

import triton
import triton.language as tl

from moe_ops._triton.kernels.activations import gated_activation, plain_activation, split_gate
from moe_ops._triton.kernels.dequantize import (
    decode_codes,
    decode_scales,
    load_blocks,
    load_offset,
    load_scales,
)
from moe_ops._triton.kernels.grouped_gemm import finish_tile, source_rows
from moe_ops._triton.kernels.schedule import begin_walk, walked_tile, zero_tail

# The least rows of a tile that tensor cores multiply: as the columns of mma.sync, and as its rows.
IN_PLACE_ROWS, DOT_ROWS = tl.constexpr(8), tl.constexpr(16)
# How many neighbours along K a thread holds in the layout that Triton gives the operands of mma.sync
# here (its kWidth). With another number the result is the same, by way of shuffles.
K_WIDTH = tl.constexpr(4 if triton.__version__.startswith(("3.6.", "3.7.")) else 2)


@triton.jit
def _column_of(j, n0, width, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Return the column of z that column j of a tile is, and whether the matrix has it.

    With HALVES a tile is BLOCK_N // 2 columns from n0 on, and the same columns of the second half.
    """
    if HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        in_half = n0 + j % HALF
        column = (j // HALF) * width + in_half
        is_column = in_half < width
    else:
        column = n0 + j
        is_column = column < width
    return column, is_column


@triton.jit
def multiply_decoded(
    x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
    source, in_source, e, n0, width, N, K, B, G, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    HALVES: tl.constexpr, EVEN_K: tl.constexpr,
    BITS: tl.constexpr, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, ENCODING: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Return x[source] @ weight[e].T in fp32, (BLOCK_M, BLOCK_N), for the tile at n0."""
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP
    k = tl.arange(0, BLOCK_K)
    x_pointers = (
        x_ptr + source[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i = tl.arange(0, BLOCK_N * BLOCK_G)
    row, in_rows = _column_of(i // BLOCK_G, n0, width, BLOCK_N, HALVES)
    column = i % BLOCK_G
    codes, scales = load_blocks(
        codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
        e, row, column, in_rows, N, B, G, BITS, ENCODING, GROUP, BLOCK_ROWS,
    )  # fmt: skip
    x = tl.load(x_pointers, mask=in_source[:, None] & (k < K)[None, :], other=0)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=1):
        # What the next step reads comes meanwhile; past the last one everything is masked. Triton's
        # own pipeline would also stage the table.
        x_pointers += tl.cast(stride_xk, tl.int64) * BLOCK_K
        column += BLOCK_G
        in_next = k0 + BLOCK_K + k < K
        next_x = tl.load(x_pointers, mask=in_source[:, None] & in_next[None, :], other=0)
        next_codes, next_scales = load_blocks(
            codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
            e, row, column, in_rows, N, B, G, BITS, ENCODING, GROUP, BLOCK_ROWS,
        )  # fmt: skip
        weight = decode_codes(codes, BITS, LOW_FIRST, VALUES, HAS_FP8) * scales
        weight = weight.to(x.dtype).reshape((BLOCK_N, BLOCK_K))
        if not EVEN_K:
            # Codes of zero fill the last block of a row, and they need not mean zero.
            weight = tl.where((k0 + k < K)[None, :], weight, 0.0)
        acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
        x, codes, scales = next_x, next_codes, next_scales
    return acc


@triton.jit
def sum_decoded(
    x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
    source, in_source, e, n0, width, N, K, B, G, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
    BITS: tl.constexpr, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, ENCODING: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_FP8: tl.constexpr, WHOLE_RUNS: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return what multiply_decoded returns, but the weights are not rounded to the dtype of x.

    It is for programs of one warp, in which nothing waits at a barrier. A thread owns a run, eight
    neighbouring numbers, of each row of the tile: it sums their products, and the run's scale
    multiplies the sum. The threads are summed behind the loop. Triton's pipeline brings codes and x
    while others are used; the scales, of which some are narrower than it can copy, come a step ahead.
    WHOLE_RUNS says whether a row of codes is a whole number of runs, as rows of four bits are. An
    expert has fewer than 2**31 numbers.
    """
    RUN: tl.constexpr = 8
    PER_LOAD: tl.constexpr = 8 if BITS == 4 else 1
    RUNS: tl.constexpr = BLOCK_K // RUN
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    LOADS: tl.constexpr = RUN // PER_LOAD
    k = tl.arange(0, BLOCK_K)
    x_pointers = (
        x_ptr + source[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
    )
    # Threads follow the elements of what is loaded, so these indices are one-dimensional.
    e = e.to(tl.int64)
    i = tl.arange(0, BLOCK_N * RUNS)
    row, in_rows = _column_of(i // RUNS, n0, width, BLOCK_N, HALVES)
    # Neighbouring runs are contiguous. Triton must not know it, or it gives a thread two or four.
    run = tl.max_contiguous(i % RUNS, 1)
    row_width = B // 4 if BITS == 4 else B
    pointers = codes_ptr + e * N * row_width + (row * row_width + run * LOADS)[:, None]
    pointers += tl.arange(0, LOADS)[None, :]
    i = tl.arange(0, BLOCK_N * GROUPS)
    scale_row, has_scale = _column_of(i // GROUPS, n0, width, BLOCK_N, HALVES)
    column = i % GROUPS
    block = scale_row // BLOCK_ROWS * G + column
    num_blocks = (N + BLOCK_ROWS - 1) // BLOCK_ROWS * G
    offset = load_offset(nested_offset_ptr, e, True, ENCODING)
    raw, nested = load_scales(
        scale_ptr, nested_scale_ptr, e, block, has_scale & (column < G), num_blocks, ENCODING
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N, GROUPS, RUNS // GROUPS), tl.float32)
    # Without a dot Triton pipelines loads only of loops that say so.
    for k0 in tl.range(0, K, BLOCK_K, num_stages=3):
        # Codes of zero fill the last block of a row, and they need not mean zero: x is zero there.
        in_x = in_source[:, None] & (k0 + k < K)[None, :]
        x = tl.load(x_pointers, mask=in_x, other=0)
        in_codes = (in_rows & (run * LOADS < row_width))[:, None]
        if not WHOLE_RUNS:
            in_codes &= run[:, None] * LOADS + tl.arange(0, LOADS)[None, :] < row_width
        codes = tl.load(pointers, mask=in_codes, other=0)
        x_pointers += tl.cast(stride_xk, tl.int64) * BLOCK_K
        pointers += RUNS * LOADS
        run += RUNS
        column += GROUPS
        block += GROUPS
        next_raw, next_nested = load_scales(
            scale_ptr, nested_scale_ptr, e, block, has_scale & (column < G), num_blocks, ENCODING
        )
        numbers = decode_codes(codes, BITS, LOW_FIRST, VALUES, HAS_FP8)
        x = x.reshape((BLOCK_M, 1, GROUPS, RUNS // GROUPS, RUN)).to(tl.float32)
        products = numbers.reshape((1, BLOCK_N, GROUPS, RUNS // GROUPS, RUN)) * x
        scales = decode_scales(raw, nested, offset, nested_table_ptr, ENCODING)
        sums = tl.sum(products, 4) * scales.reshape((1, BLOCK_N, GROUPS, 1))
        if not EVEN_K:
            # A run behind the row's end has sums of zero, and its block's scale may be infinite.
            first = k0 + RUN * tl.arange(0, RUNS).reshape((1, 1, GROUPS, RUNS // GROUPS))
            sums = tl.where(first < K, sums, 0.0)
        acc += sums
        raw, nested = next_raw, next_nested
    return tl.sum(acc.reshape((BLOCK_M, BLOCK_N, RUNS)), 2)


@triton.jit
def decode_scaled(
    codes, scales, zero, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
    TABLE_PTX: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return numbers (any, 8 * words) of codes of four bits (any, words), times scales (any,).

    PTX is decoding_ptx's, or "" where Triton decodes. UNIT is what its integers count; None: it has
    none.
    """
    if PTX == "":
        numbers = (decode_codes(codes, 4, LOW_FIRST, VALUES, False) * scales[:, None]).to(DTYPE)
    else:
        if UNIT is None:
            bits = scales.to(tl.uint32, bitcast=True)
        else:
            bits = (scales * UNIT).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
            bits |= bits << 16
        bits = tl.broadcast_to(bits[:, None], codes.shape)
        # It is made in the layout of the codes, since its values differ by lane. LLVM moves it out of
        # the loop.
        zero = tl.broadcast_to(zero[:, None], codes.shape)
        table = tl.inline_asm_elementwise(TABLE_PTX, "=r,r", [zero], tl.int32, True, 1)
        n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
            PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r", [codes, bits, table], (tl.bfloat16,) * 8, True, 1
        )  # fmt: skip
        # Each join puts two tensors' elements side by side, so the last one makes neighbours.
        even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
        odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
        numbers = tl.join(even, odd).reshape((codes.shape[0], 8 * codes.shape[1]))
    return numbers


@triton.jit
def _load_spans(pointers, mask, stride, k, K, EVEN_K: tl.constexpr):
    """Return spans of x, (spans, 8, 2, 2), whose last two dimensions count the words.

    A word is the eight numbers that meet a word of codes. pointers (spans, 8) are those of each span's
    first word, and k is where each span begins.
    """
    if EVEN_K:
        x_0 = tl.load(pointers, mask=mask, other=0)
        x_1 = tl.load(pointers + 8 * stride, mask=mask, other=0)
        x_2 = tl.load(pointers + 16 * stride, mask=mask, other=0)
        x_3 = tl.load(pointers + 24 * stride, mask=mask, other=0)
    else:
        left = (K - k)[:, None] - tl.arange(0, 8)[None, :]
        x_0 = tl.load(pointers, mask=mask & (left > 0), other=0)
        x_1 = tl.load(pointers + 8 * stride, mask=mask & (left > 8), other=0)
        x_2 = tl.load(pointers + 16 * stride, mask=mask & (left > 16), other=0)
        x_3 = tl.load(pointers + 24 * stride, mask=mask & (left > 24), other=0)
    return tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))


@triton.jit
def _load_words(pointers, word, words, NEXT: tl.constexpr, EVEN: tl.constexpr):
    """Return the codes of two halves of a step, of rows that have `words` left."""
    if EVEN:
        is_left = words > tl.zeros((1, 1), tl.int32)
        first = tl.load(pointers, mask=is_left, other=0)
        second = tl.load(pointers + NEXT, mask=is_left, other=0)
    else:
        first = tl.load(pointers, mask=word < words, other=0)
        second = tl.load(pointers + NEXT, mask=word + NEXT < words, other=0)
    return first, second


@triton.jit
def _dot_spans(
    acc, x, codes, scales, zero, k, K, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr,
    PTX: tl.constexpr, TABLE_PTX: tl.constexpr, UNIT: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return acc (BLOCK_N, BLOCK_M) + the product of spans of a weight and of x."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    SPANS: tl.constexpr = x.shape[0] // BLOCK_M
    weight = decode_scaled(codes, scales, zero, LOW_FIRST, VALUES, PTX, TABLE_PTX, UNIT, x.dtype)
    if not EVEN_K:
        # Codes of zero fill the last block of a row, and they need not mean zero.
        weight = tl.where(k[:, None] + tl.arange(0, 32)[None, :] < K, weight, 0.0)
    # The dimensions are row, span, word, and the three bits of a number's place in it; of x the word
    # is two bits, which come last.
    weight = weight.reshape((BLOCK_N, SPANS, 4, 2, 2, 2))
    x = x.reshape((BLOCK_M, SPANS, 2, 2, 2, 2, 2))
    if K_WIDTH == 4:
        weight = weight.permute((0, 2, 4, 1, 3, 5))
        x = x.permute((0, 5, 6, 3, 1, 2, 4))
    else:
        weight = weight.permute((0, 2, 3, 4, 1, 5))
        x = x.permute((0, 5, 6, 2, 3, 1, 4))
    x = x.reshape((BLOCK_M, SPANS * 32))
    return tl.dot(weight.reshape((BLOCK_N, SPANS * 32)), x.T, acc)


@triton.jit
def dot_decoded(
    x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
    source, in_source, e, n0, width, N, K, B, G, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
    LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, ENCODING: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PTX: tl.constexpr, TABLE_PTX: tl.constexpr,
    UNIT: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return what multiply_decoded returns, for codes of four bits.

    It is for programs of one warp. A thread owns spans, 32 neighbouring numbers that have one scale,
    and tensor cores take them from it as they lie. For that a step contracts its numbers in the order
    in which mma.sync takes them (K_WIDTH), those of x too.

    A step has two halves, so that what comes a step ahead has the time of both to come. Shared memory
    would bring the codes earlier, but takes longer itself. x is loaded in the step that uses it, mostly
    from L1. An expert's codes are of fewer than 2**31 numbers.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    SPANS: tl.constexpr = HALF // 32
    # Threads follow the elements of what is loaded, so these indices are one-dimensional.
    e = e.to(tl.int64)
    source = tl.broadcast_to(source[:, None], (BLOCK_M, SPANS)).reshape((BLOCK_M * SPANS,))
    in_x = tl.broadcast_to(in_source[:, None], (BLOCK_M, SPANS)).reshape((BLOCK_M * SPANS,))
    in_x = in_x[:, None]
    k_x = tl.arange(0, BLOCK_M * SPANS) % SPANS * 32
    stride = tl.cast(stride_xk, tl.int64)
    x_pointers = x_ptr + (source.to(tl.int64) * stride_xm + k_x * stride)[:, None]
    x_pointers += tl.arange(0, 8)[None, :] * stride
    i = tl.arange(0, BLOCK_N * SPANS)
    row, in_rows = _column_of(i // SPANS, n0, width, BLOCK_N, HALVES)
    row = tl.where(in_rows, row, 0)
    k = i % SPANS * 32
    words = B // 4
    word = (k // 8)[:, None] + tl.arange(0, 4)[None, :]
    pointers = codes_ptr + e * N * words + (row * words)[:, None] + word
    first = row // BLOCK_ROWS * G
    num_blocks = (N + BLOCK_ROWS - 1) // BLOCK_ROWS * G
    offset = load_offset(nested_offset_ptr, e, True, ENCODING)
    raw_0, nested_0 = load_scales(
        scale_ptr, nested_scale_ptr, e, first + tl.minimum(k // GROUP, G - 1), True, num_blocks,
        ENCODING,
    )  # fmt: skip
    raw_1, nested_1 = load_scales(
        scale_ptr, nested_scale_ptr, e, first + tl.minimum((k + HALF) // GROUP, G - 1), True,
        num_blocks, ENCODING,
    )  # fmt: skip
    # 0, but the compiler cannot know it; table_ptx says why.
    zero = (k + N) >> 31
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    codes_0, codes_1 = _load_words(pointers, word, words, HALF // 8, EVEN_K)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=1):
        k1 = k0 + HALF
        x_0 = _load_spans(x_pointers, in_x, stride, k0 + k_x, K, EVEN_K)
        x_1 = _load_spans(x_pointers + HALF * stride, in_x, stride, k1 + k_x, K, EVEN_K)
        x_pointers += BLOCK_K * stride
        # What the next step reads of the weight comes meanwhile; past the last one, nothing.
        pointers += BLOCK_K // 8
        next_codes_0, next_codes_1 = _load_words(
            pointers, word, words - (k0 + BLOCK_K) // 8, HALF // 8, EVEN_K
        )
        next_raw_0, next_nested_0 = load_scales(
            scale_ptr, nested_scale_ptr, e, first + tl.minimum((k0 + BLOCK_K + k) // GROUP, G - 1),
            True, num_blocks, ENCODING,
        )  # fmt: skip
        next_raw_1, next_nested_1 = load_scales(
            scale_ptr, nested_scale_ptr, e, first + tl.minimum((k1 + BLOCK_K + k) // GROUP, G - 1),
            True, num_blocks, ENCODING,
        )  # fmt: skip
        scales = decode_scales(raw_0, nested_0, offset, nested_table_ptr, ENCODING)
        acc = _dot_spans(
            acc, x_0, codes_0, scales, zero, k0 + k, K, LOW_FIRST, VALUES,
            PTX, TABLE_PTX, UNIT, EVEN_K,
        )  # fmt: skip
        scales = decode_scales(raw_1, nested_1, offset, nested_table_ptr, ENCODING)
        acc = _dot_spans(
            acc, x_1, codes_1, scales, zero, k1 + k, K, LOW_FIRST, VALUES,
            PTX, TABLE_PTX, UNIT, EVEN_K,
        )  # fmt: skip
        codes_0, codes_1 = next_codes_0, next_codes_1
        raw_0, nested_0, raw_1, nested_1 = next_raw_0, next_nested_0, next_raw_1, next_nested_1
    return acc.T


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_fwd_kernel(
    x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr, bias_ptr,
    weights_ptr, gather_ptr, y_ptr, z_ptr, counts_ptr,
    num_rows, num_experts, width, K, B, G, top_k, x_divisor, limit,
    stride_xm, stride_xk, stride_bias_e, stride_bias_n, stride_wt, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, GATHER_X: tl.constexpr,
    SCATTER_Y: tl.constexpr, HAS_GATHER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, STORE_Y: tl.constexpr, STORE_Z: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_W: tl.constexpr, BITS: tl.constexpr, LOW_FIRST: tl.constexpr,
    VALUES: tl.constexpr, ENCODING: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    HAS_FP8: tl.constexpr, WHOLE_RUNS: tl.constexpr, PTX: tl.constexpr, TABLE_PTX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Compute z[row] = x[row] @ weight[e].T + bias[e], and of it y, tile by tile.

    y is topk_weights[slot] * z, or where there is an ACTIVATION y = act(z), whose `width` columns
    with GATED are half of z's: act(gate) * up. So a tile is BLOCK_N columns of z, and with GATED
    BLOCK_N // 2 of y.

    Grid (any,), persistent: a program owns the tiles pid, pid + grid size, ... It finds them from
    the counts alone. It zeros the rows of no expert in z, and in y where there is no activation.
    """
    HAS_ACTIVATION: tl.constexpr = ACTIVATION != "none"
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    BLOCK_I: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    N = 2 * width if GATED else width
    tiles_n = tl.cdiv(width, BLOCK_I)
    tiles_m, walk = begin_walk(
        counts_ptr, counts_ptr, 0, num_rows, num_experts, BLOCK_M, EXPERTS, True
    )
    used = tl.max(walk[1], 0)
    if STORE_Z:
        zero_tail(z_ptr, gather_ptr, used, num_rows, N, False, BLOCK_W)
    if STORE_Y and not HAS_ACTIVATION:
        zero_tail(y_ptr, gather_ptr, used, num_rows, N, SCATTER_Y, BLOCK_W)
    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        e, first, end, tile_n = walked_tile(
            t, tiles_m, tiles_n, walk, GROUP_M, BLOCK_M, EXPERTS, True
        )
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        n0 = tile_n * BLOCK_I if HALVES else tile_n * BLOCK_N
        # The columns of z that the rows of the matrix are counted by.
        limit_n = width if HALVES else N
        source, in_source = source_rows(gather_ptr, rows, in_rows, num_rows, x_divisor, GATHER_X)
        if BLOCK_M < IN_PLACE_ROWS:
            acc = sum_decoded(
                x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
                source, in_source, e, n0, limit_n, N, K, B, G, stride_xm, stride_xk,
                BLOCK_M, BLOCK_N, BLOCK_K, HALVES,
                BITS, LOW_FIRST, VALUES, ENCODING, GROUP, BLOCK_ROWS, HAS_FP8, WHOLE_RUNS, EVEN_K,
            )  # fmt: skip
        elif BLOCK_M < DOT_ROWS:
            acc = dot_decoded(
                x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
                source, in_source, e, n0, limit_n, N, K, B, G, stride_xm, stride_xk,
                BLOCK_M, BLOCK_N, BLOCK_K, HALVES,
                LOW_FIRST, VALUES, ENCODING, GROUP, BLOCK_ROWS, PTX, TABLE_PTX, UNIT, EVEN_K,
            )  # fmt: skip
        else:
            acc = multiply_decoded(
                x_ptr, codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
                source, in_source, e, n0, limit_n, N, K, B, G, stride_xm, stride_xk,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, HALVES, EVEN_K,
                BITS, LOW_FIRST, VALUES, ENCODING, GROUP, BLOCK_ROWS, HAS_FP8,
            )  # fmt: skip
        cols, in_cols = _column_of(tl.arange(0, BLOCK_N), n0, limit_n, BLOCK_N, HALVES)
        if HAS_BIAS:
            bias_pointers = (
                bias_ptr + e.to(tl.int64) * stride_bias_e + cols.to(tl.int64) * stride_bias_n
            )
            acc += tl.load(bias_pointers, mask=in_cols, other=0).to(tl.float32)[None, :]
        if STORE_Z:
            z_pointers = z_ptr + rows[:, None].to(tl.int64) * N + cols[None, :]
            in_z = in_rows[:, None] & in_cols[None, :]
            tl.store(z_pointers, acc.to(z_ptr.dtype.element_ty), mask=in_z)
        if HAS_ACTIVATION:
            if STORE_Y:
                if GATED:
                    gate, up = split_gate(acc, BLOCK_M, BLOCK_I, INTERLEAVED)
                    y, _, _ = gated_activation(gate, up, limit, ACTIVATION, HAS_LIMIT)
                else:
                    y, _ = plain_activation(acc, limit, ACTIVATION, HAS_LIMIT)
                i = tile_n * BLOCK_I + tl.arange(0, BLOCK_I)
                y_pointers = y_ptr + rows[:, None].to(tl.int64) * stride_y + i[None, :]
                in_y = in_rows[:, None] & (i < width)[None, :]
                tl.store(y_pointers, y.to(y_ptr.dtype.element_ty), mask=in_y)
        else:
            finish_tile(
                acc, rows, cols, in_rows, in_cols, weights_ptr, gather_ptr, y_ptr, None, None, None,
                first, end, tile_n, num_rows, N, top_k, 1, stride_wt, stride_wk, 0, 0,
                BLOCK_M, BLOCK_N, False, SCATTER_Y, HAS_GATHER, HAS_WEIGHTS, True, False, False, 1,
            )  # fmt: skip
