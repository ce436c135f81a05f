# SPDX-License-Identifier: Apache-2.0
"""Runs one problem on a device: in a configuration, compared with PyTorch, timed."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import kernel_config
from moe_ops.tuning import calls
from moe_ops.tuning.problems import Task

# How far a row may be from PyTorch's, relative to the longest row. Both round, in another order.
# These are looser than the tests' tolerances, which hold one side against fp64.
_TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
_TF32_TOLERANCE = 5e-3
# Inputs take turns until together they are larger than any L2 cache.
_ROTATED_BYTES = 2**29
_MAX_ROTATED = 8
_MAX_COMPILERS = 8

# Returns the median milliseconds of each launch. A launch takes the number of its turn.
Timer = Callable[[Mapping[KernelConfig, Callable[[int], object]]], dict[KernelConfig, float]]


class Bench:
    """One problem on the device, with inputs that take turns and the result that is expected.

    Attributes:
        inputs: arguments of the op. Together they are larger than the GPU's L2 cache.
        compared: arguments with a harder routing. The results for these are compared.
        expected: what PyTorch computes of `compared`.
        op: what is launched. It takes a kernel_config beside the arguments.
        size: bytes of one set of arguments and its results.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.problem = task.problem
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = [calls.random_arguments(task, device, generator)]
        self.compared = {**self.inputs[0], **calls.skewed_routing(task, device, generator)}
        if calls.leaves_rows_unwritten(task.problem):
            # The kernel leaves the rows of no expert unwritten.
            self.compared["used_rows"] = int(self.compared["token_counts"].sum())
        self.op, in_pytorch = calls.ops_of(task.problem)
        self.expected = calls.as_tuple(in_pytorch(**self.compared))
        given = [value for value in self.inputs[0].values() if isinstance(value, Tensor)]
        self.size = 1 + sum(t.numel() * t.element_size() for t in (*given, *self.expected))
        copies = min(_MAX_ROTATED, -(-_ROTATED_BYTES // self.size))
        self.inputs += (calls.random_arguments(task, device, generator) for _ in range(copies - 1))
        self._synchronize()

    def num_compilers(self) -> int:
        """Return how many configurations to try at once.

        Compiling takes most of the time and mostly runs without Python's lock. But each trial
        allocates its results.
        """
        if self.device.type != "cuda":
            return 1
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(_MAX_COMPILERS, os.cpu_count() or 1, free // self.size))

    def launch(self, config: KernelConfig, turn: int = 0) -> tuple[Tensor, ...]:
        """Run the op in this configuration, on the inputs whose turn it is."""
        return self._run(config, self.inputs[turn % len(self.inputs)])

    def _run(self, config: KernelConfig, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        text = kernel_config(**{self.problem.kind: config})  # type: ignore[arg-type]
        return calls.as_tuple(self.op(**arguments, kernel_config=text))

    def why_fails(self, config: KernelConfig) -> str | None:
        """Return why the configuration does not compile or launch, or None."""
        # A thread gets the device's context by its first call of CUDA's runtime. Triton encodes
        # tensor descriptors without such a call.
        self._synchronize()
        try:
            self.launch(config)
        except Exception as error:  # noqa: BLE001 - Triton's compiler raises of all kinds
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        # A fault in the kernel spoils the CUDA context, so it is raised.
        self._synchronize()
        return None

    def why_wrong(self, config: KernelConfig) -> str | None:
        """Return why the result is not PyTorch's, or None where it is."""
        # Freed memory comes back: what the kernel leaves unwritten must not hold a right result.
        poison = [torch.full_like(tensor, float("nan")) for tensor in self.expected]
        del poison
        tolerance = _TOLERANCES[self.problem.dtype]
        if self.problem.dtype == "float32":
            from moe_ops._triton.launch import precision

            is_tf32 = precision(torch.float32) == "tf32"
            tolerance = _TF32_TOLERANCE if is_tf32 else tolerance
        for actual, expected in zip(self._run(config, self.compared), self.expected, strict=True):
            error = _worst_row_error(actual, expected)
            # An error of NaN is wrong too.
            if not error <= tolerance:
                return f"a row is off by {error:.1e}, expected at most {tolerance:.1e}"
        return None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _worst_row_error(actual: Tensor, expected: Tensor) -> float:
    """Return max over rows ||actual - expected|| divided by max over rows ||expected||."""
    if expected.numel() == 0:
        return 0.0
    width = expected.shape[-1]
    # In pieces, since a large gradient in fp32 may not fit beside it.
    pieces = [t.reshape(-1, width).split(max(1, 2**26 // width)) for t in (actual, expected)]
    errors, norms = zip(
        *(((a.float() - e.float()).norm(dim=1).max(), e.float().norm(dim=1).max())
          for a, e in zip(*pieces, strict=True)),
        strict=True,
    )  # fmt: skip
    scale = torch.stack(norms).max()
    error = torch.stack(errors).max()
    return float(error / scale if scale > 0 else error)


def cuda_milliseconds(
    launches: Mapping[KernelConfig, Callable[[int], object]],
) -> dict[KernelConfig, float]:
    """Return the median milliseconds of each launch on the current CUDA device, all taking turns."""
    times: dict[KernelConfig, list[float]] = {config: [] for config in launches}

    def round_of(number: int) -> float:
        events = []
        # The GPU waits until the host has queued the round. Then no launch waits for the host.
        torch.cuda._sleep(300_000 * len(launches))
        for position, (config, launch) in enumerate(launches.items()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            # Neighbours have different inputs. So has the same launch in the next round.
            launch(number + position)
            end.record()
            events.append((config, start, end))
        torch.cuda.synchronize()
        taken = [(config, start.elapsed_time(end)) for config, start, end in events]
        for config, milliseconds in taken:
            times[config].append(milliseconds)
        return sum(milliseconds for _, milliseconds in taken)

    round_of(0)
    for of_config in times.values():
        of_config.clear()
    budget = 2000.0
    for number in range(1, 51):
        budget -= round_of(number)
        if budget < 0 and number >= 5:
            break
    return {config: statistics.median(of_config) for config, of_config in times.items()}
