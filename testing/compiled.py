# SPDX-License-Identifier: Apache-2.0
"""Compiles what the ops would launch on a GPU that is not there.

The launchers run on meta tensors and take these for tensors on the GPU. Triton's own launch
specialises and compiles the kernel for the GPU's architecture, and stops there.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moe_ops._triton import (
    adapter,
    dequantize,
    experts,
    gemm,
    launch,
    quantized,
    rows,
    schedule,
    weight_gradient,
)
from moe_ops.configs.device import KNOWN_GPUS, Device

# By the name of the architecture; shared memory is what one block may have.
GPUS = {
    "sm_75": KNOWN_GPUS["T4"],
    "sm_80": KNOWN_GPUS["A100"],
    "sm_86": KNOWN_GPUS["RTX3090"],
    "sm_89": KNOWN_GPUS["L4"],
    "sm_90": KNOWN_GPUS["H200"],
    "sm_100": KNOWN_GPUS["B200"],
    "sm_120": KNOWN_GPUS["RTX5090"],
}


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled kernel: bytes of shared memory a block, of stack a thread."""

    kernel: str
    warps: int
    shared: int
    stack: int
    registers: int
    ptx: str = field(repr=False)


class _Driver:
    """Stands in for Triton's driver, with as much of it as compiling needs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.number = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        # Triton keeps the kernels of each device by this number.
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[list[Resources]]:
    """Yield a list that fills with the resources of each launch inside. Nothing is run."""
    found: list[Resources] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_resources(run(kernel, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(device.capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        taken_for(device),
    ):
        yield found


@contextlib.contextmanager
def taken_for(device: Device) -> Iterator[None]:
    """Let the launchers take every torch device for this one."""
    with contextlib.ExitStack() as stack:
        for module in (
            adapter, dequantize, experts, gemm, launch, quantized, rows, schedule, weight_gradient,
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, "device_of", return_value=device))
        yield


@functools.cache
def _cuobjdump() -> str:
    return triton.knobs.nvidia.cuobjdump.path


def _resources(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [_cuobjdump(), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name = compiled.metadata.name
    (line,) = re.findall(rf"Function {name}:\s*(.*)", usage)
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    # A register that is spilled has its place on the stack, an array that is indexed too.
    stack = max(numbers["STACK"], numbers["LOCAL"])
    meta = compiled.metadata
    return Resources(name, meta.num_warps, meta.shared, stack, numbers["REG"], compiled.asm["ptx"])
