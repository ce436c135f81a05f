# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m moe_ops env`, `show`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import moe_ops
from moe_ops._core import library


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_ops", description=moe_ops.__doc__)
    parser.add_argument("--version", action="version", version=f"moe_ops {moe_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    env = commands.add_parser(
        "env", help="versions, devices, and which implementation serves which op and why"
    )
    env.set_defaults(run=lambda _: _env())
    show = commands.add_parser(
        "show", help="what an op's schema says, and the code generated from it"
    )
    show.add_argument("op", choices=sorted(library.OPS), metavar="OP", help="such as grouped_gemm")
    show.set_defaults(run=lambda options: _show(options.op))
    options = parser.parse_args(arguments)
    lines: Iterable[str] = options.run(options)
    print("\n".join(lines))
    return 0


def _show(name: str) -> Iterable[str]:
    op = library.OPS[name]
    yield f"# torch.ops.moe.{name}{op.schema.schema}"
    yield f"# op_schemas/{op.schema.file}"
    yield ""
    yield op.generated.source.rstrip()


def _env() -> Iterable[str]:
    yield f"moe_ops       {moe_ops.__version__}  ({Path(moe_ops.__file__).parent})"
    yield f"python        {platform.python_version()}  ({platform.platform()})"
    yield f"torch         {torch.__version__}"
    for package in ("triton", "transformers"):
        yield f"{package:<13} {_version(package)}"
    yield ""
    yield "devices"
    yield f"  cpu         {_cpu()}"
    yield from (f"  {line}" for line in _cuda())
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


def _table() -> Iterable[str]:
    rows = [("op", *library.IMPLEMENTATIONS)]
    for name, op in sorted(library.OPS.items()):
        rows.append((name, *(_choice(op, device_type) for device_type in library.IMPLEMENTATIONS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _choice(op: library.Op, device_type: str) -> str:
    try:
        choice = op.choose(device_type)
    except RuntimeError as error:
        return str(error).partition(": ")[2]
    return f"{choice.name} ({choice.reason})"
