# SPDX-License-Identifier: Apache-2.0
"""`moe_ops show`: what an op's schema says, and the code generated from it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable

from moe_ops._core import library, reference


def show(name: str, with_code: bool) -> Iterable[str]:
    """Yield what the command says of one op."""
    op = library.OPS[name]
    yield f"=== Definition (op_schemas/{op.schema.file}, since {op.schema.since})"
    yield f"torch.ops.moe.{name}{op.schema.schema}"
    yield ""
    yield "=== Reference"
    yield from reference.docstring(op.schema).splitlines()
    if with_code:
        flops = "" if op.generated.flops is None else "; flops for torch.utils.flop_counter"
        yield ""
        yield f"=== Code (kernel for each call, which checks it first; fake for FakeTensors and meta tensors{flops})"
        yield from op.generated.source.rstrip().splitlines()


def fitted(lines: Iterable[str]) -> Iterable[str]:
    """Yield lines broken at the width of the terminal, or as they are where none reads them."""
    if not sys.stdout.isatty():
        yield from lines
        return
    width = shutil.get_terminal_size().columns
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        yield from textwrap.wrap(
            line,
            width,
            subsequent_indent=indent + 4 * " ",
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
