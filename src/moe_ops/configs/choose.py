# SPDX-License-Identifier: Apache-2.0
"""Which configuration a launch gets.

In this order: what the caller gave as kernel_config; what was tuned on this machine (cache.py); what
is shipped for this GPU (tables/); what the heuristics (heuristics.py) compute from the problem, the
GPU's shared memory and its number of SMs.
"""

from __future__ import annotations

import functools
from importlib import resources

from moe_ops.configs import cache
from moe_ops.configs.device import Device
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import KernelConfig, parse
from moe_ops.configs.problem import Problem


def choose(problem: Problem, device: Device, kernel_config: str | None) -> KernelConfig:
    """The configuration of one launch."""
    if kernel_config is not None:
        given = parse(kernel_config).get(problem.kind)
        if given is not None:
            return given
    return _chosen(problem, device)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: Device) -> KernelConfig:
    tuned = cache.lookup(device.name, problem.key)
    return tuned or shipped(device.name).get(problem.key) or heuristic(problem, device)


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
