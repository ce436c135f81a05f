# SPDX-License-Identifier: Apache-2.0
"""Keep tuned configurations on disk, in one table for each GPU and set of versions.

    {"device": name, "versions": {...}, "configs": {Problem.key: fields of the configuration}}

The files in tables/ have the same format. There "device" is the GPU on which they were measured,
and each serves all GPUs of an architecture (choose.py). Any number of processes may read and write at once: a
writer keeps what others wrote, and replaces the whole file. MOE_OPS_CACHE_DIR says where the files
are. With MOE_OPS_AUTOTUNE=0 they are not read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_ops._version import __version__
from moe_ops.configs.kernel_config import PASSES, KernelConfig
from moe_ops.configs.kernel_string import read_fields
from moe_ops.configs.strict_json import read_json

logger = logging.getLogger("moe_ops")

# These are called when the result of lookup() may have changed.
on_change: list[Callable[[], object]] = []


def is_enabled() -> bool:
    """Return whether tuning is on; MOE_OPS_AUTOTUNE=0 turns it off, and the cache with it."""
    return os.environ.get("MOE_OPS_AUTOTUNE") != "0"


def directory() -> Path:
    """Return the files' directory: in MOE_OPS_CACHE_DIR, or in the user's cache directory."""
    placed = os.environ.get("MOE_OPS_CACHE_DIR")
    if placed:
        return Path(placed) / "configs"
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # the user has no home, as in some containers
        caches = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return caches / "moe_ops" / "configs"


def path_of(device_name: str) -> Path:
    """Return the file for this GPU and the running versions."""
    parts = [f"{package}-{version}" for package, version in versions().items()]
    return directory() / ("_".join([table_name(device_name), *parts]) + ".json")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that a tuned configuration depends on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"moe_ops": __version__, "torch": str(torch.__version__), "triton": triton}


def table_name(device_name: str) -> str:
    """Turn a GPU's name into a table's: 'NVIDIA H200' -> 'nvidia_h200'."""
    return "_".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


def lookup(device_name: str, key: str) -> KernelConfig | None:
    """Return the configuration tuned for Problem.key on this GPU, or None."""
    return _loaded(path_of(device_name)).get(key) if is_enabled() else None


def store(device_name: str, configs: Mapping[str, KernelConfig]) -> None:
    """Add configurations, by Problem.key, to the file of this GPU."""
    path = path_of(device_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            write_table(path, device_name, configs)
    except OSError as error:
        _warn_once(f"moe_ops: cannot keep tuned configurations in {path.parent}: {error}")
    _loaded(path).update(configs)
    _announce()


def clear() -> None:
    """Delete all tuned configurations, for all GPUs and versions, on disk and in memory."""
    folder = directory()
    if folder.is_dir():
        with _locked(folder):
            for file in folder.glob("*.json"):
                file.unlink(missing_ok=True)
    forget()


def forget() -> None:
    """Make the next lookup read the disk again."""
    _loaded.cache_clear()
    _announce()


def write_table(path: Path, device_name: str, configs: Mapping[str, KernelConfig]) -> None:
    """Add configurations to a table; other processes see the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    merged = {**_read(path), **configs}
    # With one configuration a line, a person can read the difference of two tables.
    lines = (f"{json.dumps(key)}: {json.dumps(merged[key].to_dict())}" for key in sorted(merged))
    header = f'"device": {json.dumps(device_name)},\n"versions": {json.dumps(versions())}'
    body = ",\n".join(lines)
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        written.write_text(f'{{{header},\n"configs": {{\n{body}\n}}}}\n', encoding="utf-8")
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def parse_table(text: str) -> dict[str, KernelConfig]:
    """Return the configurations in a table, by Problem.key.

    Raises:
        ValueError: the text is not a table.
    """
    content = read_json(text)
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, dict):
        raise ValueError('not a table: expected a JSON object with an object "configs"')
    return {key: _read_config(key, values) for key, values in configs.items()}


def _read_config(key: str, values: Any) -> KernelConfig:
    kind = key.partition(" ")[0]
    if kind not in PASSES:
        expected = f"keys that begin with one of {tuple(PASSES)}"
        raise ValueError(f"not a table: expected {expected}, got {key!r}")
    try:
        return read_fields(kind, values)
    except ValueError as error:
        raise ValueError(f"not a table: {key!r}: {error}") from None


def _announce() -> None:
    for listener in on_change:
        listener()


@functools.cache
def _loaded(path: Path) -> dict[str, KernelConfig]:
    return _read(path)


def _read(path: Path) -> dict[str, KernelConfig]:
    """Return the table in a file; if it cannot be read, warn and return an empty one."""
    try:
        return parse_table(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"moe_ops: cannot read {path}, so it counts as empty: {error}")
        return {}


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process ends."""
    import fcntl

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
