# SPDX-License-Identifier: Apache-2.0
"""Choose the configuration of a launch.

The first of these that exists wins: the caller's kernel_config; one tuned on this machine
(cache.py); one shipped for this architecture (tables/); the one that heuristics.py computes from the
problem and the GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from moe_ops.configs import cache
from moe_ops.configs.device import Device
from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.heuristics import heuristic_and_reason
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import parse
from moe_ops.configs.problem import Operands, Problem, dense_operands


@dataclass(frozen=True)
class Choice:
    """Hold a configuration, and where it came from.

    Attributes:
        config: the configuration.
        source: "given", "tuned", "shipped" or "computed".
        reason: why this one.
    """

    config: KernelConfig
    source: str
    reason: str


def choose(
    problem: Problem,
    device: Device,
    kernel_config: str | None = None,
    operands: Operands | None = None,
) -> Choice:
    """Return the configuration of one launch.

    Args:
        problem: the product.
        device: the GPU.
        kernel_config: the caller's configurations, as one string.
        operands: which of its tensors TMA can describe; None: all are dense and aligned.
    """
    if kernel_config is not None:
        given = parse(kernel_config).get(problem.kind)
        if given is not None:
            return Choice(given, "given", "kernel_config asks for it")
    return _chosen(problem, device, operands or dense_operands(problem))


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: Device, operands: Operands) -> Choice:
    tuned = cache.lookup(device.name, problem.key)
    if tuned is not None and _serves(tuned, operands):
        return Choice(tuned, "tuned", "the fastest of those measured on this machine")
    known = shipped(device.capability).get(problem.key)
    fits = known is not None and shared_memory(known, problem, device) <= device.shared_memory
    if known is not None and fits and _serves(known, operands):
        major, minor = device.capability
        return Choice(
            known, "shipped", f"the fastest of those measured on compute capability {major}.{minor}"
        )
    config, why = heuristic_and_reason(problem, device, operands)
    return Choice(config, "computed", why)


def _serves(config: KernelConfig, operands: Operands) -> bool:
    """Return whether the kernel that was measured can serve; nobody measured its fallback."""
    return all(operands) or not config.warp_specialize


cache.on_change.append(_chosen.cache_clear)


@functools.cache
def shipped(capability: tuple[int, int]) -> dict[str, KernelConfig]:
    """Return the package's table for a compute capability, by Problem.key; empty if there is none.

    A good tile depends on the streaming multiprocessor, and a grid on their number. So what was
    measured on one GPU serves all of its architecture, whatever their names.
    """
    architecture = "sm_{}{}".format(*capability)
    file = resources.files("moe_ops.configs") / "tables" / f"{architecture}.json"
    if not file.is_file():
        return {}
    return cache.parse_table(file.read_text(encoding="utf-8"))
