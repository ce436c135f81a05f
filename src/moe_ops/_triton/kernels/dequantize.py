# SPDX-License-Identifier: Apache-2.0
"""Dequantise the weights of experts, in any format.

E num_experts, N out_features, D in_features, G blocks of a row, B bytes of a row, P rows of blocks.

A format is constants here: BITS of a code, LOW_FIRST, the VALUES of codes of four bits (their fp32
bits), and the encoding of its scales. Codes of four bits are looked up, since no cheap arithmetic
gives nf4's. So a fifth format of four bits needs no change here. Another width of codes, or another
encoding of scales, is one more function.
"""

import triton
import triton.language as tl


@triton.jit
def _table(BITS: tl.constexpr, SIZE: tl.constexpr):
    """Return fp32 constants, given by their bits, as a tensor (SIZE,).

    Triton makes -0.0 a 0.0.
    """
    i = tl.arange(0, SIZE)
    table = tl.zeros((SIZE,), dtype=tl.int32)
    for entry in tl.static_range(SIZE):
        table = tl.where(i == entry, BITS[entry], table)
    return table.to(tl.float32, bitcast=True)


@triton.jit
def _dequantize_write_table_kernel(table_ptr, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Write fp32 constants, given by their bits, to memory. Grid (1,)."""
    tl.store(table_ptr + tl.arange(0, SIZE), _table(BITS, SIZE))


@triton.jit
def decode_e4m3(codes, HAS_FP8: tl.constexpr):
    """Return the exact fp32 values of float8_e4m3fn codes (uint8); NaN stays NaN."""
    if HAS_FP8:
        # One instruction decodes two codes to fp16.
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        # Shift sign, exponent and mantissa to their places in fp32. The exponents' biases differ by
        # 120, so this is 2**-120 of the value, for subnormals too. What reads as 480 is NaN.
        bits = codes.to(tl.int8, bitcast=True).to(tl.int32) << 20
        values = (bits & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
        values = tl.where(tl.abs(values) == 480, float("nan"), values)
    return values


@triton.jit
def decode_e8m0(codes):
    """Return 2**(code - 127) in fp32; 255 is NaN, and 0 a subnormal."""
    bits = codes.to(tl.int32)
    values = (bits << 23).to(tl.float32, bitcast=True)
    values = tl.where(bits == 0, 5.877471754111438e-39, values)
    return tl.where(bits == 255, float("nan"), values)


@triton.jit
def load_scales(scale_ptr, nested_scale_ptr, e, block, mask, num_blocks, ENCODING: tl.constexpr):
    """Return the codes and the nested scales of blocks, for decode_scales.

    An expert counts its blocks row after row. scale_ptr points to fp32 numbers if ENCODING is
    "float32", to the bits of bf16 numbers if it is "bfloat16", else to bytes.
    """
    codes = tl.load(scale_ptr + e * num_blocks + block, mask=mask, other=0)
    nested = codes
    if ENCODING == "nested":
        num_nested = (num_blocks + 255) // 256
        nested = tl.load(
            nested_scale_ptr + e * num_nested + block // 256, mask=mask, other=0.0
        )  # fmt: skip
    return codes, nested


@triton.jit
def load_offset(nested_offset_ptr, e, mask, ENCODING: tl.constexpr):
    """Return the offsets of the nested scales of experts, 0 where there are none."""
    offset = 0.0
    if ENCODING == "nested":
        offset = tl.load(nested_offset_ptr + e, mask=mask, other=0.0)
    return offset


@triton.jit
def decode_scales(codes, nested, offset, nested_table_ptr, ENCODING: tl.constexpr):
    """Return the fp32 scales of what load_scales and load_offset returned.

    nested_table_ptr points to what the bytes of nested scales mean. In a kernel that is compiled
    without FMA a nested scale is rounded twice: its product, then the sum.
    """
    if ENCODING == "nested":
        scales = tl.load(nested_table_ptr + codes.to(tl.int32)) * nested + offset
    elif ENCODING == "e8m0":
        scales = decode_e8m0(codes)
    elif ENCODING == "bfloat16":
        scales = (codes.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        scales = codes
    return scales


@triton.jit
def load_blocks(
    codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
    e, n, column, mask, N, B, G,
    BITS: tl.constexpr, ENCODING: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return the codes (blocks, any), for decode_codes, and the fp32 scales (blocks, 1).

    Block i is the one in row n[i], at column[i] of the row's blocks, of expert e or e[i]. What is
    not in the mask, or past a row, is zero. Codes of eight bits are read as bytes, codes of four as
    words of eight codes.
    """
    PER_LOAD: tl.constexpr = 8 if BITS == 4 else 1
    num_blocks = (N + BLOCK_ROWS - 1) // BLOCK_ROWS * G
    e = e.to(tl.int64) + tl.zeros_like(n)
    in_row = mask & (column < G)
    block = n // BLOCK_ROWS * G + column
    raw, nested = load_scales(scale_ptr, nested_scale_ptr, e, block, in_row, num_blocks, ENCODING)
    offset = load_offset(nested_offset_ptr, e, in_row, ENCODING)
    scales = decode_scales(raw, nested, offset, nested_table_ptr, ENCODING)
    width = B // 4 if BITS == 4 else B
    i = column[:, None] * (GROUP // PER_LOAD) + tl.arange(0, GROUP // PER_LOAD)[None, :]
    rows = ((e * N + n) * width)[:, None]
    codes = tl.load(codes_ptr + rows + i, mask=mask[:, None] & (i < width), other=0)
    return codes, scales[:, None]


@triton.jit
def decode_codes(
    codes, BITS: tl.constexpr, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, HAS_FP8: tl.constexpr
):  # fmt: skip
    """Return the fp32 numbers (any, elements) of codes (any, loads), without their scales."""
    if BITS == 8:
        numbers = decode_e4m3(codes, HAS_FP8)
    else:
        # The first of a byte's two codes is in its low half, or in its high half. Each join puts
        # two tensors' elements side by side, so the last one makes neighbours.
        FIRST: tl.constexpr = 0 if LOW_FIRST else 4
        SECOND: tl.constexpr = 4 - FIRST
        first = tl.join(
            tl.join(codes >> FIRST, codes >> 16 + FIRST),
            tl.join(codes >> 8 + FIRST, codes >> 24 + FIRST),
        )
        second = tl.join(
            tl.join(codes >> SECOND, codes >> 16 + SECOND),
            tl.join(codes >> 8 + SECOND, codes >> 24 + SECOND),
        )
        SIZE: tl.constexpr = 8 * codes.shape[0] * codes.shape[1]
        nibbles = (tl.join(first, second) & 15).reshape((SIZE,))
        # Triton looks up in shared memory, or in a program of one warp by shuffles: one instruction
        # a number.
        numbers = tl.gather(_table(VALUES, 16), nibbles, 0)
        numbers = numbers.reshape((codes.shape[0], 8 * codes.shape[1]))
    return numbers


@triton.jit(do_not_specialize=["num_rows", "N", "G"])
def _dequantize_fwd_kernel(
    codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr, output_ptr,
    num_rows, N, D, B, G, stride,
    BITS: tl.constexpr, LOW_FIRST: tl.constexpr, VALUES: tl.constexpr, ENCODING: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
    UNIT: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Write weight[e, n, d] = codes[e, n, d] * scale[e, n // BLOCK_ROWS, d // GROUP].

    The product is rounded to fp32, and then to the output's dtype. All stored tensors are
    contiguous; rows of codes of four bits are whole blocks. D, B and the stride of the output's rows
    are passed in UNIT, as in kernels/rows.py.

    Grid (cdiv(num_rows, ROWS), cdiv(G, BLOCK_G)): one program owns BLOCK_G blocks of each of ROWS
    neighbouring rows. It needs nothing initialised but the table of nested scales.
    """
    D *= UNIT
    B *= UNIT
    stride *= UNIT
    i = tl.arange(0, ROWS * BLOCK_G)
    row = tl.program_id(0).to(num_rows.dtype) * ROWS + i // BLOCK_G
    column = tl.program_id(1) * BLOCK_G + i % BLOCK_G
    is_row = row < num_rows
    codes, scales = load_blocks(
        codes_ptr, scale_ptr, nested_scale_ptr, nested_offset_ptr, nested_table_ptr,
        row // N, row % N, column, is_row, N, B, G, BITS, ENCODING, GROUP, BLOCK_ROWS,
    )  # fmt: skip
    weight = decode_codes(codes, BITS, LOW_FIRST, VALUES, HAS_FP8) * scales
    d = column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(
        output_ptr + row[:, None].to(tl.int64) * stride + d,
        weight.to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & (d < D),
    )
