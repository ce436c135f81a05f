# SPDX-License-Identifier: Apache-2.0
"""The PTX that decodes codes of four bits, run by an interpreter of the few instructions it has.

Triton's interpreter runs no PTX. The GPU suite runs the kernel that it is for.
"""

import random
import re
import struct
from typing import Any

import pytest
import torch

from moe_ops._triton.code_book import CodeBook, decoding_ptx, table_ptx
from moe_ops.quantization.codes import Nibbles
from moe_ops.quantization.formats import FORMATS

LANES = 32
WORD = 0xFFFFFFFF
BOOKS = {n: f.codes for n, f in FORMATS.items() if isinstance(f.codes, Nibbles)}
books = pytest.mark.parametrize("format", BOOKS)


def bf16(bits: int) -> float:
    return struct.unpack(">f", bits.to_bytes(2, "big") + bytes(2))[0]


def bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).bfloat16().view(torch.int16)) & 0xFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt.b32: a selector's fourth bit asks for eight copies of the byte's sign."""
    source, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out.append(0xFF * (byte >> 7) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def fma(a: int, b: int, c: int) -> int:
    """fma.rn.bf16x2. The products here are exact in double precision, and so are the sums."""
    halves = [
        bf16(a >> s & 0xFFFF) * bf16(b >> s & 0xFFFF) + bf16(c >> s & 0xFFFF) for s in (0, 16)
    ]
    return bits_of(halves[0]) | bits_of(halves[1]) << 16


def run(ptx: str, warp: list[dict[str, int]]) -> None:
    """Run PTX in all lanes of a warp: `warp` has each lane's registers by name, such as $0."""
    body = ptx.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (part.strip() for part in body.replace("\n", " ").split(";"))):
        if line.startswith(".reg"):
            continue
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, _, operands = rest.partition(" ")
        before = [dict(registers) for registers in warp]
        for lane, registers in enumerate(warp):
            if guard and not registers[guard[1:]]:
                continue
            step(name, operands, lane, before, registers)


def fp32_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">f", value), "big")


def fp32(bits: int) -> float:
    return struct.unpack(">f", bits.to_bytes(4, "big"))[0]


def step(
    name: str, operands: str, lane: int, warp: list[dict[str, int]], out: dict[str, int]
) -> None:
    if unpacked := re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", operands):
        assert name == "mov.b32"
        low, high, source = unpacked.groups()
        out[low], out[high] = warp[lane][source] & 0xFFFF, warp[lane][source] >> 16
        return
    target, *sources = operands.split(", ")

    def value(source: str) -> int:
        if source == "%laneid":
            return lane
        return warp[lane][source] if source in warp[lane] else int(source, 0)

    if name == "shfl.sync.idx.b32":
        register, index, clamp, members = sources
        assert (int(clamp, 0), int(members, 0)) == (31, WORD)
        out[target] = warp[value(index) & 31][register]
        return
    a, b, c = (*map(value, sources), 0, 0)[:3]
    out[target] = {
        "mov.b32": lambda: a, "mov.u32": lambda: a, "add.u32": lambda: a + b & WORD,
        "shr.u32": lambda: a >> b, "and.b32": lambda: a & b, "or.b32": lambda: a | b,
        "xor.b32": lambda: a ^ b, "setp.eq.u32": lambda: int(a == b),
        "prmt.b32": lambda: prmt(a, b, c), "fma.rn.bf16x2": lambda: fma(a, b, c),
        "mul.rn.f32": lambda: fp32_bits(float(torch.tensor(fp32(a)) * torch.tensor(fp32(b)))),
        "cvt.rn.bf16x2.f32": lambda: bits_of(fp32(a)) << 16 | bits_of(fp32(b)),
    }[name]()  # fmt: skip


def decoded(book: CodeBook, low_first: bool, words: list[int], scales: list[int]) -> list[Any]:
    """Return the eight numbers that each lane decodes of its word and what it has in $9."""
    warp = [{"$1": 0} for _ in range(LANES)]
    run(table_ptx(book), warp)
    for registers, word, scale in zip(warp, words, scales, strict=True):
        registers.update({"$10": registers.pop("$0"), "$8": word, "$9": scale})
    run(decoding_ptx(book, low_first), warp)
    return [[bf16(registers[f"${i}"]) for i in range(8)] for registers in warp]


@books
@pytest.mark.parametrize("scales_in_bf16", [True, False])
def test_numbers_are_the_rounded_products(format, scales_in_bf16):
    """Of every code in every place of every lane."""
    codes, generator = BOOKS[format], random.Random(format)
    book = CodeBook.of(codes.table, scales_in_bf16)
    for turn in range(16):
        words = [
            sum((turn + place + lane) % 16 << 4 * place for place in range(8))
            for lane in range(LANES)
        ]
        scales = torch.tensor([generator.uniform(-2, 2) for _ in range(LANES)])
        if book.unit is None:
            bits = [fp32_bits(s) for s in scales.tolist()]
        else:
            scales = scales.bfloat16().float()
            bits = [bits_of(s) * 0x10001 for s in (scales * book.unit).tolist()]
        packed = torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(LANES, 1)
        want = (codes.decode(packed.view(torch.uint8)) * scales[:, None]).bfloat16().float()
        got = torch.tensor(decoded(book, codes.low_first, words, bits))
        assert torch.equal(got, want), (turn, got, want)


@books
def test_values_that_seven_bits_hold_are_looked_up_by_bytes(format):
    for scales_in_bf16 in (True, False):
        book = CodeBook.of(BOOKS[format].table, scales_in_bf16)
        by_bytes = scales_in_bf16 and format != "nf4"
        assert bool(book.integers) == by_bytes
        assert ("shfl" in decoding_ptx(book, True)) != by_bytes
        for n, value in zip(book.integers, book.values, strict=False):
            assert n * (book.unit or 0.0) == value
