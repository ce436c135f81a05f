# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m moe_ops env`, `show`, `explain`, `tune`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import moe_ops
from moe_ops._core import library
from moe_ops.cli.env import env
from moe_ops.cli.show import fitted, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_ops", description=moe_ops.__doc__)
    parser.add_argument("--version", action="version", version=f"moe_ops {moe_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about_env = "versions, devices, and which implementation serves which op and why"
    commands.add_parser("env", help=about_env).set_defaults(run=lambda _: env())
    _add_show(commands)
    _add_explain(commands)
    _add_tune(commands)
    options = parser.parse_args(arguments)
    lines: Iterable[str] = options.run(options)
    print("\n".join(lines))
    return 0


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "show", help="what an op's schema says, and the code generated from it"
    )
    parser.add_argument(
        "op", choices=sorted(library.OPS), metavar="OP", help="such as grouped_gemm"
    )
    parser.add_argument("--no-code", action="store_true", help="the definition and reference alone")
    parser.set_defaults(run=lambda options: fitted(show(options.op, not options.no_code)))


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from moe_ops.cli import explain

    parser = commands.add_parser(
        "explain",
        help="which kernel computes each product of a model's experts, and why",
        description="Shows the kernel, the configuration and its source for each projection and "
        "pass, and why a wish of a configuration cannot be met.",
    )
    explain.add_arguments(parser)
    parser.set_defaults(run=lambda options: explain.explain(options, parser))


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from moe_ops.cli import tune

    parser = commands.add_parser(
        "tune",
        help="find the fastest kernel configurations of a model's experts on this GPU",
        description="Tunes the GEMMs of a model's experts, forward and backward, and keeps what it "
        "finds where later processes look. An interrupted run goes on where it stopped.",
    )
    tune.add_arguments(parser)
    parser.set_defaults(run=lambda options: tune.tune(options, parser))
