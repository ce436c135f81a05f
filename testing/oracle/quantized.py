# SPDX-License-Identifier: Apache-2.0
"""Reads quantised weights, one element at a time, bits by arithmetic.

All numbers are Python floats. A code has at most 24 bits and so has a scale: their product is exact.

E num_experts, N out_features, D in_features.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def float_of_bits(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Return the number whose sign, exponent and mantissa these bits are, as in IEEE 754."""
    bits %= 1 << (1 + exponent_bits + mantissa_bits)
    sign = -1.0 if bits >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (bits >> mantissa_bits) % (1 << exponent_bits)
    mantissa = bits % (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def fp32(bits: int) -> float:
    return float_of_bits(bits, 8, 23)


def bf16(bits: int) -> float:
    return float_of_bits(bits, 8, 7)


def bits_at(stored: Sequence[int], index: int, size: int) -> int:
    """Return number `index` of those that lie in bytes, each of `size` bytes, the lowest first."""
    return int.from_bytes(bytes(stored[size * index : size * (index + 1)]), "little")


def e4m3(code: int) -> float:
    """Return the value of a float8_e4m3fn. It has no infinities: only 127 and 255 are NaN."""
    if code % 128 == 127:
        return math.nan
    if code % 128 >= 120:
        return math.ldexp(8 + code % 8, 8 - 3) * (-1.0 if code >= 128 else 1.0)
    return float_of_bits(code, 4, 3)


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def e2m1(code: int) -> float:
    """Return the value of a float of one sign, two exponent bits and one of mantissa, all finite."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def dynamic_code() -> list[float]:
    """Return bitsandbytes' signed dynamic code of eight bits, exact but for fp64's rounding."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        for i in range(count):
            value = 10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count)
            values += [value, -value]
    return sorted(values)


def rounded(value: float) -> float:
    """Return the fp32 number nearest to value."""
    return torch.tensor(value, dtype=torch.float64).float().item()


# The bytes of a scale, and what reads them; a nested one needs more than its byte.
SCALES: dict[str, tuple[int, Callable[[int], float] | None]] = {
    "float32": (4, fp32),
    "bfloat16": (2, bf16),
    "e8m0": (1, e8m0),
    "nested": (1, None),
}


def code_value(format: str, row: Sequence[int], d: int) -> float:
    """Return the value of element d of a row of bytes."""
    if format == "fp8_block":
        return e4m3(row[d])
    byte = row[d // 2]
    if format == "nf4":
        return NF4[byte >> 4 if d % 2 == 0 else byte & 15]
    code = byte & 15 if d % 2 == 0 else byte >> 4
    return e2m1(code) if format == "mxfp4" else float(code - 8)


def dequantize(
    tensors: Mapping[str, Tensor],
    format: str,
    shape: Sequence[int],
    group_size: int,
    scale_encoding: str,
    dynamic: Sequence[float] | None = None,
) -> Tensor:
    """Return the weight (E, N, D) in fp64, each element a code times a scale, not rounded.

    `dynamic` replaces dynamic_code(), whose numbers lack the rounding of fp32.
    """
    num_experts, rows, width = shape
    dynamic = dynamic_code() if dynamic is None else dynamic
    columns = math.ceil(width / group_size)
    size, read = SCALES[scale_encoding]
    stored = {name: tensor.tolist() for name, tensor in tensors.items()}

    def scale_of(e: int, row: int, column: int) -> float:
        bits = bits_at(stored["scale"][e][row], column, size)
        if read is not None:
            return read(bits)
        nested = fp32(bits_at(stored["nested_scale"][e], (row * columns + column) // 256, 4))
        offset = fp32(bits_at(stored["nested_offset"][e], 0, 4))
        return rounded(rounded(dynamic[bits] * nested) + offset)

    output: list[float] = []
    for e, n in itertools.product(range(num_experts), range(rows)):
        row = n // 128 if format == "fp8_block" else n
        scales = [scale_of(e, row, column) for column in range(columns)]
        codes = stored["codes"][e][n]
        output += [code_value(format, codes, d) * scales[d // group_size] for d in range(width)]
    return torch.tensor(output, dtype=torch.float64).view(num_experts, rows, width)


def rounded_dynamic_code() -> list[float]:
    """Return the numbers of dynamic_code() in fp32, computed in the order of bitsandbytes."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (decade - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return sorted(values)


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    nested_scale: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    group_size: int,
    scale_encoding: str,
    in_features: int,
    output_dtype: torch.dtype,
) -> Tensor:
    """Return the weight (E, N, D) in fp64: the product rounded to fp32 and then to output_dtype."""
    tensors = {"codes": codes, "scale": scale}
    if nested_scale is not None and nested_offset is not None:
        tensors |= {"nested_scale": nested_scale, "nested_offset": nested_offset}
    shape = (*codes.shape[:2], in_features)
    dynamic = rounded_dynamic_code()
    exact = dequantize(tensors, format, shape, group_size, scale_encoding, dynamic)
    return exact.float().to(output_dtype).double()


STORED = (
    "codes", "scale", "nested_scale", "nested_offset", "format", "group_size", "scale_encoding",
)  # fmt: skip


def plain_call(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the call of a plain op that a call of its form for quantised weights stands for.

    Its weights are those that dequantize_weight makes in the dtype of the first argument. A call of
    another op is returned as it is.
    """
    if "_quantized" not in name:
        return name, dict(arguments)
    given = dict(arguments)

    def weight(prefix: str, in_features: int, dtype: torch.dtype) -> Tensor:
        stored = {field: given.pop(prefix + field) for field in STORED}
        return dequantize_weight(**stored, in_features=in_features, output_dtype=dtype)

    if name == "grouped_gemm_quantized":
        input = given["input"]
        given["weight"] = weight("", input.shape[1], input.dtype)
    elif name == "grouped_gemm_quantized_dx":
        given["weight"] = weight("", given.pop("in_features"), given["grad_output"].dtype)
    elif name == "fused_experts_quantized_up_backward":
        dtype = given["grad_pre_activation"].dtype
        given["gate_up_proj"] = weight("gate_up_", given.pop("hidden_size"), dtype)
    else:
        rows = given["grad_output" if name.endswith("backward") else "hidden_states"]
        up = weight("gate_up_", rows.shape[1], rows.dtype)
        inner = up.shape[1] // 2 if given["gated"] else up.shape[1]
        given |= {"gate_up_proj": up, "down_proj": weight("down_", inner, rows.dtype)}
    if name.endswith("_backward") and "_lora_" not in name:
        # Beside adapters a plain weight has no gradient either.
        first, *rest = given["needs"]
        given |= {"needs": [first, False, *rest], "transposed": False}
    return name.replace("_quantized", ""), given


def without_weight(name: str, outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return what the quantised form of a backward op returns: no gradient of the weight."""
    if "_quantized" in name and name.endswith("_backward") and "_lora_" not in name:
        first, _, *rest = outputs
        return (first, *rest)
    return outputs


def block_scale(format: str, largest: float) -> float:
    """Return the scale of a block whose largest absolute value is given, before it is stored."""
    if format == "nf4":
        return largest
    if largest == 0:
        return 1.0
    if not math.isfinite(largest):
        return math.nan
    if format == "mxfp4":
        exponent = -127
        while 7 * 2.0**exponent < largest:
            exponent += 1
        return 2.0**exponent
    return max(largest / {"fp8_block": 448, "int4": 7.5}[format], 2.0**-126)


def code_values(format: str) -> list[float]:
    """Return the values of all finite codes."""
    if format == "fp8_block":
        return [e4m3(code) for code in range(256) if code % 128 != 127]
    if format == "nf4":
        return list(NF4)
    return [e2m1(c) if format == "mxfp4" else float(c - 8) for c in range(16)]
