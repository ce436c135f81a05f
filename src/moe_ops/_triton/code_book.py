# SPDX-License-Identifier: Apache-2.0
"""Write the PTX that decodes codes of four bits in the registers of the thread that loaded them.

The numbers are those of `dequantize`: a code's value times its fp32 scale, rounded to bf16 once. One
in a million of nf4 differs, since the kernel rounds its nested scale once and `dequantize` twice.
There are two ways to look up the values. A permutation of bytes finds four at a time, where seven
bits hold them and bf16 holds the scales. A shuffle finds one, in fp32, that a lane of the warp holds.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class CodeBook:
    """How sixteen values are looked up.

    Attributes:
        values: of the codes.
        integers: the values as multiples of the unit; empty if shuffles look the values up.
        unit: what an integer counts; None if there are none.
    """

    values: tuple[float, ...]
    integers: tuple[int, ...]
    unit: float | None

    @classmethod
    @functools.cache
    def of(cls, values: tuple[float, ...], scales_in_bf16: bool) -> CodeBook:
        for unit in (2.0**-i for i in range(8 if scales_in_bf16 else 0)):
            integers = tuple(round(value / unit) for value in values)
            is_exact = all(n * unit == v for n, v in zip(integers, values, strict=True))
            # bf16 holds 128 less the lowest one, and the bytes 0 to 127.
            if is_exact and max(integers) - min(integers) < 128 and min(integers) >= -128:
                return cls(values, integers, unit)
        return cls(values, (), None)


@functools.lru_cache(maxsize=64)
def table_ptx(book: CodeBook) -> str:
    """Return PTX that writes to $0 what decoding_ptx wants in $10. $1 is 0.

    That is the value, in fp32, of the code that the last four bits of the lane's number are. With
    integers it is 0.
    """
    if book.integers:
        # Not a constant: ptxas would keep constants in uniform registers, and move one for each use.
        return "mov.b32 $0, $1;"
    lines = ["{ .reg .pred is; .reg .b32 code;", "mov.u32 code, %laneid; and.b32 code, code, 15;"]
    for i, value in enumerate(book.values):
        lines.append(f"setp.eq.u32 is, code, {i}; @is mov.b32 $0, {_fp32(value):#010x};")
    return "\n".join([*lines, "}"])


@functools.lru_cache(maxsize=64)
def decoding_ptx(book: CodeBook, low_first: bool) -> str:
    """Return PTX that writes eight numbers in bf16, $0 to $7, of the eight codes in $8.

    They are the integers of the book times the bf16 number that both halves of $9 hold, or without
    integers the values times the fp32 number in $9. $10 is what table_ptx writes. It needs compute
    capability 8.0.
    """
    lines = _permuting(book.integers, low_first) if book.integers else _shuffling(low_first)
    for i in range(4):
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, n{i};")
    return "\n".join(["{ .reg .b32 n<4>;", *lines, "}"])


def _permuting(integers: tuple[int, ...], low_first: bool) -> list[str]:
    """Return PTX that writes scaled integers to n0 to n3, two in each.

    prmt looks up the bytes that three bits of each of four codes name, among eight bytes. A fourth
    bit that is set asks for the byte's sign instead, which is 0 in this table. So the other eight
    bytes are looked up with the fourth bits inverted, and `or` joins the two. A byte b behind 0x43
    is 128 + b in bf16.
    """
    lowest = min(integers)
    words = [sum(integers[i + j] - lowest << 8 * j for j in range(4)) for i in (0, 4, 8, 12)]
    lines = [
        ".reg .b32 codes, other, low, high, bytes, magic, one, offset, zero;",
        f"mov.b32 zero, {_pair(-0.0)};",
        f"mov.b32 magic, 0x43434343; mov.b32 one, {_pair(1.0)}; mov.b32 offset, {_pair(lowest - 128.0)};",
    ]
    pairs = ("0x4140", "0x4342") if low_first else ("0x4041", "0x4243")
    for half in range(2):
        lines += [
            f"shr.u32 codes, $8, {16 * half}; xor.b32 other, codes, 0x88888888;",
            f"add.u32 low, $10, {words[0]}; mov.b32 high, {words[1]}; prmt.b32 bytes, low, high, codes;",
            f"add.u32 low, $10, {words[2]}; mov.b32 high, {words[3]}; prmt.b32 low, low, high, other;",
            "or.b32 bytes, bytes, low;",
        ]
        for i, order in zip((2 * half, 2 * half + 1), pairs, strict=True):
            lines += [
                f"prmt.b32 n{i}, bytes, magic, {order}; fma.rn.bf16x2 n{i}, n{i}, one, offset;",
                f"fma.rn.bf16x2 n{i}, n{i}, $9, zero;",
            ]
    return lines


def _shuffling(low_first: bool) -> list[str]:
    """Return PTX that writes scaled values to n0 to n3, two in each.

    A shuffle takes five bits of its index. So both halves of the warp hold the table.
    """
    lines = [".reg .b32 code; .reg .f32 v<8>;"]
    for i in range(8):
        lines += [
            f"shr.u32 code, $8, {4 * i}; shfl.sync.idx.b32 v{i}, $10, code, 31, 0xffffffff;",
            f"mul.rn.f32 v{i}, v{i}, $9;",
        ]
    for i in range(4):
        first, second = (2 * i, 2 * i + 1) if low_first else (2 * i + 1, 2 * i)
        lines.append(f"cvt.rn.bf16x2.f32 n{i}, v{second}, v{first};")
    return lines


def _fp32(value: float) -> int:
    """Return the bits of an fp32 number."""
    return int.from_bytes(struct.pack(">f", value), "big")


def _pair(value: float) -> str:
    """Return two equal bf16 numbers, of one that bf16 holds."""
    return f"{(_fp32(value) >> 16) * 0x10001:#010x}"
