# SPDX-License-Identifier: Apache-2.0
"""`moe_ops env`: versions, devices, and which implementation serves which op and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import moe_ops
from moe_ops import _distribution
from moe_ops._core import library
from moe_ops.configs import cache, choose


def env() -> Iterable[str]:
    """Yield the lines of the command."""
    yield f"moe_ops       {moe_ops.__version__}  ({Path(moe_ops.__file__).parent})"
    if other := _distribution.other_distribution():
        yield f"{_distribution.OTHER:<13} {_distribution.told(other)}"
    yield f"python        {platform.python_version()}  ({platform.platform()})"
    yield f"torch         {torch.__version__}"
    for package in ("triton", "transformers", "peft"):
        yield f"{package:<13} {_version(package)}"
    yield ""
    yield "devices"
    yield f"  cpu         {_cpu()}"
    yield from (f"  {line}" for line in _cuda())
    yield ""
    yield "kernel configurations"
    yield from (f"  {line}" for line in configurations())
    yield ""
    forced = os.environ.get(library.ENVIRONMENT_VARIABLE)
    yield f"{library.ENVIRONMENT_VARIABLE}={forced or ''}" + ("" if forced else "  (not set)")
    yield ""
    yield from _table()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {torch.get_num_threads()} threads"


def _cuda() -> Iterable[str]:
    if not torch.cuda.is_available():
        yield "cuda        none that this torch sees"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}      {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )


def configurations() -> Iterable[str]:
    """How many are shipped and tuned for each kind of GPU; what is neither is computed."""
    gpus = {
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    }
    for name, capability in sorted(gpus):
        shipped = len(choose.shipped(capability))
        yield f"{name}: {shipped} shipped, {_tuned(cache.path_of(name))}"
    read = "" if cache.is_enabled() else "  (not read: MOE_OPS_AUTOTUNE=0)"
    yield f"tuned in    {cache.directory()}{read}"


def _tuned(file: Path) -> str:
    try:
        return f"{len(cache.parse_table(file.read_text(encoding='utf-8')))} tuned"
    except FileNotFoundError:
        return "0 tuned"
    except (OSError, ValueError) as error:
        return f"none tuned, since {file} cannot be read: {error}"


def _table() -> Iterable[str]:
    """A line for each op: which implementation serves each type of device, and why."""
    rows = [("op", *library.IMPLEMENTATIONS)]
    # Why nothing serves an op, in the order of the marks. Most ops share a reason.
    obstacles: list[str] = []
    for name, op in sorted(library.OPS.items()):
        cells = [_choice(op, device_type, obstacles) for device_type in library.IMPLEMENTATIONS]
        rows.append((name, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()
    for number, obstacle in enumerate(obstacles, 1):
        yield f"({number}) {obstacle}"


def _choice(op: library.Op, device_type: str, obstacles: list[str]) -> str:
    """Return what a cell says. The reason why nothing serves the op is added to the obstacles."""
    try:
        choice = op.choose(device_type)
    except RuntimeError as error:
        obstacle = str(error).partition(": ")[2]
        if obstacle not in obstacles:
            obstacles.append(obstacle)
        return f"none ({obstacles.index(obstacle) + 1})"
    return f"{choice.name} ({choice.reason})"
