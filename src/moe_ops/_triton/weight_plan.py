# SPDX-License-Identifier: Apache-2.0
"""Decide how a product reads its quantised weight, and why, before anything is allocated.

There are two ways:

- The product's kernel decodes the weight. It reads the packed bytes, and decodes them again for each
  tile of rows.
- The weight is dequantised first, to a scratch that is written once and read once. A kernel for plain
  weights multiplies by it. The scratch holds as many experts as a bound of its bytes allows. Each
  part of the experts is then one product.

The way that costs less is taken. The costs are estimates: they count bytes and instructions. The
tiles of one warp were measured on an H200 (docs/notes/quantised.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from moe_ops.configs.device import Device
from moe_ops.configs.kernel_string import parse
from moe_ops.quantization.formats import FORMATS

# A part costs three launches and the last wave of its tiles: an estimated 1% to 2% of its product
# where it has this size. Activations of 16,384 tokens are as large.
SCRATCH_BYTES = 512 * 2**20
# Decoding a number takes about as long as reading so many bytes. An estimate: it is 3.6 instructions
# (int4, mxfp4) or 4.6 (nf4) where tensor cores take the numbers from registers, and about 7 elsewhere
# (docs/notes/quantised.md).
_DECODING = 1.0
# Rows of the lowest tile of each kernel: where tensor cores take the numbers from shared memory, where
# they take them from the registers that decode them (kernels/quantized.py has both numbers too), and
# where no tensor core multiplies. Two rows are enough for the last: where experts have one row in the
# mean, those that have any have 1.3 to 1.6.
_LOW, _IN_PLACE, _FEW = 16, 8, 2


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """Say how a product reads its quantised weight.

    Attributes:
        in_product: whether the product's kernel decodes the weight.
        options: that kernel's tile, and Triton's own options; empty without in_product.
        programs_per_sm: of that kernel.
        parts: how many products compute it, each with the experts of one scratch.
        experts: the experts of a part.
        scratch_bytes: the size of the scratch; 0 with in_product.
        reason: why.
    """

    in_product: bool
    options: dict[str, Any]
    programs_per_sm: int
    parts: int
    experts: int
    scratch_bytes: int
    reason: str


# One lookup, keyed by plain values only, as plan_once in plan.py.
@functools.lru_cache(maxsize=4096)
def plan_weight(
    kind: str,
    dtype: torch.dtype,
    format: str,
    group_size: int,
    num_experts: int,
    out_features: int,
    in_features: int,
    rows: int,
    device: Device,
    kernel_config: str | None = None,
) -> WeightPlan:
    """Return the plan of a quantised weight (E, N, D) in a product.

    Args:
        kind: "forward" or "backward_dX".
        dtype: what the product multiplies in.
        format: of the weight.
        group_size: of its blocks along in_features.
        num_experts: E.
        out_features: N.
        in_features: D.
        rows: the mean number of rows per expert, as one of ROWS_BUCKETS.
        device: the GPU.
        kernel_config: the caller's configurations, as one string.
    """
    bits = FORMATS[format].codes.bits
    # The interpreter multiplies no bf16. There fp16 stands for it.
    in_place = bits == 4 and dtype == (torch.float16 if device.is_interpreted else torch.bfloat16)
    padded = -(-in_features // group_size) * group_size
    height = _tile_rows(rows, out_features * padded, in_place)
    # Beside its full tiles an expert has a last one, which is half full in the mean.
    tiles = max(rows / height + 0.5, 1.0)
    packed = bits / 8
    decoding, moving = tiles * (packed + _DECODING), packed + 2 * dtype.itemsize
    obstacle = _obstacle(kind, (num_experts, out_features, in_features), device, kernel_config)
    if obstacle is None and decoding <= moving:
        options, programs = _tile(height, group_size, dtype)
        reason = (
            f"decoded by the product itself, once for each tile of rows ({tiles:.1f} an expert): a number "
            f"costs {decoding:.1f} bytes of reading that way, and {moving:.1f} by way of a scratch (estimates)"
        )
        return WeightPlan(True, options, programs, 1, num_experts, 0, reason)
    why = obstacle or (
        f"a number costs {moving:.1f} bytes of reading that way; the product itself would decode it once "
        f"for each tile of rows ({tiles:.1f} an expert), at {decoding:.1f} (estimates)"
    )
    # Bytes of a dequantised expert.
    of_expert = out_features * in_features * dtype.itemsize
    parts = min(max(-(-num_experts * of_expert // SCRATCH_BYTES), 1), max(num_experts, 1))
    experts = -(-num_experts // parts) if num_experts else 0
    parts = -(-num_experts // experts) if experts else 1
    scratch = experts * of_expert
    if parts == 1:
        how = f"all experts at once into {_size(scratch)}"
    else:
        number = "one expert" if experts == 1 else f"{experts} experts"
        limit = f"at most {_size(SCRATCH_BYTES)}, or one expert"
        how = f"{number} at a time into {_size(scratch)} ({limit})"
    reason = f"dequantised first, {how}: {why}"
    return WeightPlan(False, {}, 0, parts, experts, scratch, reason)


def _obstacle(
    kind: str, shape: tuple[int, int, int], device: Device, kernel_config: str | None
) -> str | None:
    """Say why the product's kernel cannot decode the weight; None where it can."""
    if kind != "forward":
        return "dX reads the weight along out_features, and no kernel decodes along these"
    if kernel_config is not None and kind in parse(kernel_config):
        return "kernel_config was given, which is for kernels of plain weights"
    if device.capability < (8, 0) and not device.is_interpreted:
        major, minor = device.capability
        return (
            "the kernel that decodes needs compute capability 8.0, and this GPU has "
            f"{major}.{minor}"
        )
    return "the weight has no elements" if 0 in shape else None


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def _tile_rows(rows: int, of_expert: int, in_place: bool) -> int:
    """Return the rows of a tile of the kernel that decodes.

    Args:
        rows: as of plan_weight.
        of_expert: the codes of an expert, with those of its padding.
        in_place: whether tensor cores can take the numbers from the registers that decode them.
    """
    # Both kernels of one warp count the codes of an expert in 32 bits.
    if of_expert < 2**31:
        if in_place and rows <= _IN_PLACE:
            return _IN_PLACE
        if rows <= 1:
            return _FEW
    return _LOW if rows <= 8 else 32 if rows <= 32 else 64


def _tile(height: int, group_size: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Return the options of the kernel that decodes, and its programs on each SM."""
    options: dict[str, Any]
    if height < _LOW:
        # One warp: with more of them a step waits at barriers for longer than it computes. 128
        # registers a thread leave room for 16 programs. The lowest tile that tensor cores multiply
        # has 16 columns.
        columns = 16 if height == _IN_PLACE else 8
        options = {
            "BLOCK_M": height,
            "BLOCK_N": columns,
            "BLOCK_K": 256,
            "num_warps": 1,
            "maxnreg": 128,
        }
        programs = 16
    else:
        # A thread holds 64 numbers of a step, and what the next step reads. So an SM has registers
        # for three programs of four warps with a low tile, and for two with a high one.
        columns, contracted = (64, 128) if dtype.itemsize == 2 else (32, max(64, group_size))
        options = {"BLOCK_M": height, "BLOCK_N": columns, "BLOCK_K": contracted, "num_warps": 4}
        programs = 3 if height == _LOW else 2
    return options | {"GROUP_M": 8}, programs
