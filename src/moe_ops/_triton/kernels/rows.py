# SPDX-License-Identifier: Apache-2.0
"""Move and sum rows, for permute, unpermute, grouped_gemm and fused_experts.

T num_tokens, K top_k, H hidden_size, R = T * K routed rows; slot = token * K + k.

A row whose index is out of range gets the width 0: nothing is read or written there. No kernel here
needs anything initialised.

Triton learns of an integer only whether 16 divides it. So widths and strides of 8 * n elements, whose
rows are whole pieces of 16 bytes, are passed as n with UNIT 8; without that a thread would move 2
bytes at a time. Elsewhere UNIT is 1.
"""

import triton
import triton.language as tl

from moe_ops._triton.kernels.dependent_launch import follow_on


@triton.jit(do_not_specialize=["num_rows"])
def invert_permutation_kernel(indices_ptr, inverse_ptr, num_rows, BLOCK: tl.constexpr):
    """Write inverse[indices[i]] = i; an index out of range is skipped.

    Grid (cdiv(num_rows, BLOCK),): one program owns BLOCK indices.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(indices_ptr + i, mask=i < num_rows, other=-1).to(tl.int64)
    tl.store(inverse_ptr + row, i, mask=(row >= 0) & (row < num_rows))


@triton.jit(do_not_specialize=["num_rows"])
def copy_rows_kernel(
    input_ptr, rows_ptr, output_ptr, stride_t, stride_h, stride_o, num_rows, hidden_size, top_k,
    BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy each token's row to its top_k rows: output[rows[t * top_k + k]] = input[t].

    Grid (num_tokens, cdiv(hidden_size, BLOCK_H)): one program owns BLOCK_H columns of a token and
    reads them once.
    """
    stride_t *= UNIT
    stride_o *= UNIT
    hidden_size *= UNIT
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = h < hidden_size
    x = tl.load(input_ptr + token * stride_t + h.to(tl.int64) * stride_h, mask=mask)
    for k in range(top_k):
        row = tl.load(rows_ptr + token * top_k + k).to(tl.int64)
        width = tl.where((row >= 0) & (row < num_rows), hidden_size, 0)
        tl.store(output_ptr + row * stride_o + h, x, mask=h < width)


@triton.jit(do_not_specialize=["num_rows"])
def sum_rows_kernel(
    input_ptr, rows_ptr, weights_ptr, used_ptr, output_ptr,
    stride_r, stride_h, stride_wt, stride_wk, num_rows, hidden_size,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, NUM_USED: tl.constexpr, BLOCK_USED: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum each token's rows: output[t] = sum_k weights[t, k] * input[rows[t * TOP_K + k]].

    Without HAS_ROWS the rows are in slot order: rows[i] is i. Grid (num_tokens, cdiv(hidden_size,
    BLOCK_H)): one program owns BLOCK_H columns of a token. It sums in fp32, in the order of k. The
    NUM_USED numbers at used_ptr, if there are any, sum to the rows that belong to an expert: those
    behind them, and their weights, are not read and count as zeros.
    """
    if PDL:
        follow_on()
    stride_r *= UNIT
    hidden_size *= UNIT
    if NUM_USED > 0:
        i = tl.arange(0, BLOCK_USED)
        used = tl.load(used_ptr + i, mask=i < NUM_USED, other=0)
        num_rows = tl.minimum(num_rows, tl.sum(used, 0))
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = h < hidden_size
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        if HAS_ROWS:
            row = tl.load(rows_ptr + row).to(tl.int64)
        width = tl.where((row >= 0) & (row < num_rows), hidden_size, 0)
        x = tl.load(
            input_ptr + row * stride_r + h.to(tl.int64) * stride_h, mask=h < width, other=0
        ).to(tl.float32)
        if HAS_WEIGHTS:
            # The weight of a dropped slot may be NaN.
            pointer = weights_ptr + token * stride_wt + k * stride_wk
            x *= tl.load(pointer, mask=(row >= 0) & (row < num_rows), other=0).to(tl.float32)
        total += x
    tl.store(output_ptr + token * hidden_size + h, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gather_rows_kernel(
    input_ptr, gather_ptr, weights_ptr, output_ptr,
    stride_r, stride_h, stride_o, stride_wt, stride_wk, num_rows, hidden_size, divisor, top_k,
    HAS_GATHER: tl.constexpr, MOVES: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy rows into expert order: output[i] = weights[slot] * input[slot // divisor].

    slot is gather[i], or i without HAS_GATHER. Without MOVES the rows are in expert order already:
    input[i] is read. Grid (num_rows, cdiv(hidden_size, BLOCK_H)): one program owns BLOCK_H columns
    of a row.
    """
    stride_r *= UNIT
    stride_o *= UNIT
    hidden_size *= UNIT
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = i
    if HAS_GATHER:
        slot = tl.load(gather_ptr + i).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_rows)
    slot = tl.where(is_slot, slot, 0)
    row = i
    if MOVES:
        row = slot // divisor
    width = tl.where(is_slot, hidden_size, 0)
    x = tl.load(input_ptr + row * stride_r + h.to(tl.int64) * stride_h, mask=h < width, other=0)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + (slot // top_k) * stride_wt + (slot % top_k) * stride_wk)
        x = (x.to(tl.float32) * weight.to(tl.float32)).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + i * stride_o + h, x, mask=h < hidden_size)


@triton.jit(do_not_specialize=["num_rows"])
def shift_rows_kernel(
    input_ptr, gather_ptr, output_ptr, stride_r, stride_o, num_rows, width, divisor,
    HAS_GATHER: tl.constexpr, MOVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do what gather_rows_kernel does without weights, for rows of 16 bits that begin anywhere.

    It loads aligned words of 8 bytes and shifts them into place. Of a word that holds a byte of the
    row it may read all 8, and nobody uses the others. The output's rows begin at words, and may hold
    anything past `width` in their last one. Grid (num_rows, cdiv(width, 4 * BLOCK)): one program
    owns BLOCK words of a row.
    """
    i = tl.program_id(0).to(tl.int64)
    slot = i
    if HAS_GATHER:
        slot = tl.load(gather_ptr + i).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_rows)
    row = i
    if MOVES:
        row = tl.where(is_slot, slot, 0) // divisor
    start = input_ptr.to(tl.int64) + row * stride_r * 2
    shift = (start & 7) * 8
    words = (start & -8).to(tl.pointer_type(tl.uint64))
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_bytes = tl.minimum(2 * (tl.where(is_slot, width, 0) - 4 * j), 8)
    low = tl.load(words + j, mask=num_bytes > 0, other=0)
    # The next word has the end of this one's bytes.
    high = tl.load(words + j + 1, mask=(num_bytes > 0) & (shift // 8 + num_bytes > 8), other=0)
    shift = shift.to(tl.uint64)
    # In two steps: a shift by 64 is not defined.
    word = (low >> shift) | (high << (63 - shift) << 1)
    output = (output_ptr + i * stride_o).to(tl.pointer_type(tl.uint64), bitcast=True)
    tl.store(output + j, word, mask=4 * j < width)


@triton.jit(do_not_specialize=["num_parts", "width"])
def sum_parts_kernel(parts_ptr, output_ptr, num_parts, width, BLOCK: tl.constexpr):
    """Sum the rows of a contiguous matrix of fp32 in order: output[j] = sum_i parts[i, j].

    Grid (cdiv(width, BLOCK),): one program owns BLOCK columns.
    """
    j = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = j < width
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        total += tl.load(parts_ptr + j, mask=mask, other=0)
        parts_ptr += width
    tl.store(output_ptr + j, total.to(output_ptr.dtype.element_ty), mask=mask)
