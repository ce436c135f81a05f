# SPDX-License-Identifier: Apache-2.0
"""Which configuration a launch gets.

In this order: what the caller gave as kernel_config; what was tuned on this machine (cache.py); what
is shipped for this GPU (tables/); what the heuristics (heuristics.py) compute from the problem, the
GPU's shared memory and its number of SMs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from moe_ops.configs import cache
from moe_ops.configs.device import Device
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import parse
from moe_ops.configs.problem import Problem


@dataclass(frozen=True)
class Choice:
    """A configuration, and where it came from: "given", "tuned", "shipped" or "computed"."""

    config: KernelConfig
    source: str


def choose(problem: Problem, device: Device, kernel_config: str | None = None) -> Choice:
    """Return the configuration of one launch."""
    if kernel_config is not None:
        given = parse(kernel_config).get(problem.kind)
        if given is not None:
            return Choice(given, "given")
    return _chosen(problem, device)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: Device) -> Choice:
    if tuned := cache.lookup(device.name, problem.key):
        return Choice(tuned, "tuned")
    if known := shipped(device.name).get(problem.key):
        return Choice(known, "shipped")
    return Choice(heuristic(problem, device), "computed")


cache.on_change.append(_chosen.cache_clear)


def forget() -> None:
    """Makes the next launches choose anew, and read the disk cache anew."""
    cache.forget()


@functools.cache
def shipped(device_name: str) -> dict[str, KernelConfig]:
    """The table that comes with the package for this GPU, by Problem.key; empty without one."""
    file = resources.files("moe_ops.configs") / "tables" / f"{cache.table_name(device_name)}.json"
    if not file.is_file():
        return {}
    return cache.parse_table(file.read_text(encoding="utf-8"))
