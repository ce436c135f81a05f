# SPDX-License-Identifier: Apache-2.0
"""What the kernels take on GPUs that are not here: registers, spills, shared memory, occupancy.

    python -m benchmarks.architectures

The kernels of an expert layer are compiled for each architecture, as the launchers would launch
them there, with the configurations that moe_ops chooses. Nothing is run, so nothing here says how
fast they are. It writes benchmarks/results/architectures_compiled.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.timing import write
from moe_ops.configs.device import Device
from testing import kernel_calls as calls
from testing.compiled import GPUS, Resources, compiling_for
from testing.gpu_report import kernel_sha256

RESULT = Path(__file__).parent / "results" / "architectures_compiled.json"
PART = "compiled"
# What is compiled: a training step of Qwen3-30B-A3B's experts, and a few tokens without a gradient.
SIZES = {"training": ("forward", "backward"), "decode-8": ("inference",)}

KIB = 1024
REGISTERS = 64 * KIB


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor holds at a time.

    From the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide.

    Attributes:
        warps: the most warps.
        blocks: the most blocks.
        shared: bytes of shared memory.
        reserved: bytes of it that the system takes for each block.
    """

    warps: int
    blocks: int
    shared: int
    reserved: int = KIB


LIMITS = {
    (7, 5): Limits(32, 16, 64 * KIB, 0),
    (8, 0): Limits(64, 32, 164 * KIB),
    (8, 6): Limits(48, 16, 100 * KIB),
    (8, 9): Limits(48, 24, 100 * KIB),
    (9, 0): Limits(64, 32, 228 * KIB),
    (10, 0): Limits(64, 32, 228 * KIB),
    (12, 0): Limits(48, 24, 100 * KIB),
}


def blocks_per_sm(kernel: Resources, limits: Limits) -> int:
    """Return how many blocks of a kernel an SM holds. Registers are given out 256 to a warp."""
    of_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * kernel.warps)
    by_shared = limits.shared // max(kernel.shared + limits.reserved, 1)
    return min(limits.blocks, limits.warps // kernel.warps, by_registers, by_shared)


def cases(architecture: str, device: Device) -> Iterator[dict[str, Any]]:
    """Yield a record of each kernel and size; of several variants that with the most registers."""
    limits = LIMITS[device.capability]
    # bf16 needs sm_80.
    dtype = torch.bfloat16 if device.capability >= (8, 0) else torch.float16
    for size, passes in SIZES.items():
        with compiling_for(device) as found:
            made = calls.experts(calls.SIZES[size], dtype)
            for name in passes:
                made[name]()
        most: dict[str, Resources] = {}
        for kernel in sorted(found, key=lambda kernel: kernel.registers):
            most[kernel.kernel] = kernel
        for name, kernel in sorted(most.items()):
            blocks = blocks_per_sm(kernel, limits)
            yield {
                "architecture": architecture, "gpu": device.name, "size": size, "kernel": name,
                "registers": kernel.registers, "stack": kernel.stack, "shared": kernel.shared,
                "warps": kernel.warps, "blocks": blocks,
                "occupancy": round(blocks * kernel.warps / limits.warps, 3),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(GPUS))
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if unknown := set(args.only) - set(GPUS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(GPUS)}")
    records = []
    for architecture in args.only:
        found = list(cases(architecture, GPUS[architecture]))
        most = max(record["stack"] for record in found)
        print(f"{architecture}: {len(found)} kernels, at most {most} bytes of stack", flush=True)
        records += found
    facts = {
        "date": time.strftime("%Y-%m-%d"), "triton": triton.__version__, "part": PART,
        "kernel_sha256": kernel_sha256(),
    }  # fmt: skip
    write(args.output, facts, records)


if __name__ == "__main__":
    main()
