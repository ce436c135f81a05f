# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m moe_ops env`, `show`, `explain`, `tune`, `bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

import moe_ops
from moe_ops._core import library
from moe_ops.cli.env import env
from moe_ops.cli.show import fitted, show

_DESCRIPTION = "Look at moe_ops on this machine: its ops, which kernels compute a model's experts, and how fast."
# What a shell reports of a program that a signal ended: 128 and the signal's number.
_INTERRUPTED, _NO_READER = 128 + 2, 128 + 13


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments. `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[_Parser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status.

    Without a command it prints the help. Where nobody reads on, as after `| head`, it ends without
    a word, as other programs do.

    Args:
        arguments: those of the command line, or None for this process's own.

    Returns:
        status: 0; 1 where bench could not time moe_ops itself, or where the output cannot be
            written; 130 after Ctrl-C; 141 where the reader of the output has gone.

    Raises:
        SystemExit: with one line that says what is wrong (status 1), or status 2 where it is an
            argument.
    """
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("python -m moe_ops: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        # Python flushes once more when it ends, and would say there what we have just caught.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _NO_READER
        print(f"python -m moe_ops: {error}", file=sys.stderr)
        return 1
    return status


def _run(arguments: Sequence[str] | None) -> int:
    parser = _Parser(prog="python -m moe_ops", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"moe_ops {moe_ops.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    about_env = "versions, devices, and which implementation serves which op and why"
    commands.add_parser("env", help=about_env).set_defaults(run=lambda _: (env(), 0))
    _add_show(commands)
    _add_explain(commands)
    _add_tune(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        # print_help() would keep a BrokenPipeError to itself.
        print(parser.format_help(), end="")
        return 0
    lines: Iterable[str]
    status: int
    lines, status = options.run(options)
    print("\n".join(lines))
    return status


def _add_show(commands: _Commands) -> None:
    parser = commands.add_parser(
        "show", help="what an op's schema says, and the code generated from it"
    )
    parser.add_argument(
        "op", choices=sorted(library.OPS), metavar="OP", help="such as grouped_gemm"
    )
    parser.add_argument("--no-code", action="store_true", help="the definition and reference alone")
    parser.set_defaults(run=lambda options: (fitted(show(options.op, not options.no_code)), 0))


def _add_explain(commands: _Commands) -> None:
    from moe_ops.cli import explain

    parser = commands.add_parser(
        "explain",
        help="which kernel computes each product of a model's experts, and why",
        description="Shows the kernel, the configuration and its source for each projection and "
        "pass, and why a wish of a configuration cannot be met.",
    )
    explain.add_arguments(parser)
    parser.set_defaults(run=lambda options: (explain.explain(options, parser), 0))


def _add_tune(commands: _Commands) -> None:
    from moe_ops.cli import tune

    parser = commands.add_parser(
        "tune",
        help="find the fastest kernel configurations of a model's experts on this GPU",
        description="Tunes the GEMMs of a model's experts, forward and backward, and keeps what it "
        "finds where later processes look. An interrupted run goes on where it stopped.",
    )
    tune.add_arguments(parser)
    parser.set_defaults(run=lambda options: (tune.tune(options, parser), 0))


def _add_bench(commands: _Commands) -> None:
    from moe_ops.cli import bench

    parser = commands.add_parser(
        "bench",
        help="time the block of a model's experts on this machine, against what torch offers",
        description="Times moe_ops.fused_experts and torch's ways to compute the same block, forward "
        "and with gradients, in turns. A result is compared with a loop in fp32 before it is timed. "
        "The activation is SiLU and the routing uniform.",
    )
    bench.add_arguments(parser)
    parser.set_defaults(run=lambda options: bench.bench(options, parser))
