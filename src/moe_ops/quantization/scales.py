# SPDX-License-Identifier: Apache-2.0
"""The encodings of scales: how stored bytes become one fp32 number for each block.

Every stored tensor is uint8. No cast of a module changes it, and every backend of torch.distributed
sends it, which is not so of int16.

The functions here take the tensors of one expert. R rows and G columns of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ops.quantization.codes import nearest

# Neighbouring scales that share a nested scale.
NESTED_BLOCK = 256


def _make_dynamic_code() -> tuple[float, ...]:
    """Return the 256 values of the dynamic code of eight bits, in ascending order.

    The decades from 1e-7 .. 1e-6 up to 0.1 .. 1 have 1, 2, 4, ... 64 values of each sign, in the
    middles of equal intervals. Zero and one complete them.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(values))


DYNAMIC_CODE = _make_dynamic_code()


@dataclass(frozen=True)
class Float:
    """A scale is a number in `dtype`."""

    name: str
    dtype: torch.dtype

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors."""
        return {"scale": (rows, columns * self.dtype.itemsize)}

    def encode(self, scale: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of scales (R, G)."""
        return {"scale": scale.to(self.dtype).view(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales (R, G) in fp32."""
        return tensors["scale"].view(self.dtype).float()


@dataclass(frozen=True)
class PowerOfTwo:
    """A scale is 2 ** (byte - 127). The byte 255 is NaN."""

    name = "e8m0"

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors."""
        return {"scale": (rows, columns)}

    def encode(self, exponent: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of integer exponents (R, G). One of 128 becomes NaN."""
        return {"scale": (exponent.clamp(-127, 128) + 127).to(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales (R, G) in fp32, which has them all; 2 ** -127 is a subnormal."""
        exponent = tensors["scale"].int()
        normal = (exponent << 23).view(torch.float32)
        least = torch.full_like(normal, 2.0**-127)
        scale = torch.where(exponent == 0, least, normal)
        return torch.where(exponent == 255, torch.full_like(normal, torch.nan), scale)


@dataclass(frozen=True)
class Nested:
    """A scale is a byte of bitsandbytes' dynamic code, itself scaled, plus the expert's offset.

        scale[b] = dynamic_code[byte[b]] * nested_scale[b // 256] + nested_offset

    b counts the blocks of an expert, row after row. Product and sum are each rounded to fp32.

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861) for the code, QLoRA
    (arXiv:2305.14314) for its use.
    """

    name = "nested"

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors."""
        return {
            "scale": (rows, columns),
            "nested_scale": (4 * -(-rows * columns // NESTED_BLOCK),),
            "nested_offset": (4,),
        }

    def encode(self, scale: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of scales (R, G) in fp32.

        One that is not finite makes all of them NaN, since they share the offset.
        """
        offset = scale.mean()
        rest = (scale - offset).flatten()
        rest = torch.nn.functional.pad(rest, (0, -rest.numel() % NESTED_BLOCK))
        rest = rest.unflatten(0, (-1, NESTED_BLOCK))
        nested = rest.abs().amax(1)
        codes = nearest(rest / nested.where(nested > 0, 1.0)[:, None], _dynamic_code(scale.device))
        return {
            "scale": codes.flatten()[: scale.numel()].view(scale.shape).to(torch.uint8),
            "nested_scale": nested.view(torch.uint8),
            "nested_offset": offset.where(offset.isfinite(), torch.nan)[None].view(torch.uint8),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales (R, G) in fp32."""
        codes = tensors["scale"]
        nested = tensors["nested_scale"].view(torch.float32).repeat_interleave(NESTED_BLOCK)
        product = _dynamic_code(codes.device)[codes.int()]
        product = product * nested[: codes.numel()].view(codes.shape)
        return product + tensors["nested_offset"].view(torch.float32)


FLOAT32 = Float("float32", torch.float32)
BFLOAT16 = Float("bfloat16", torch.bfloat16)
E8M0 = PowerOfTwo()
NESTED = Nested()

Scale = Float | PowerOfTwo | Nested

SCALES: dict[str, Scale] = {scale.name: scale for scale in (FLOAT32, BFLOAT16, E8M0, NESTED)}


def aligned(tensor: Tensor) -> Tensor:
    """Return bytes that may be seen as numbers: contiguous, and beginning at a multiple of four."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() % 4 else tensor


def _dynamic_code(device: torch.device) -> Tensor:
    return torch.tensor(DYNAMIC_CODE, dtype=torch.float32, device=device)
