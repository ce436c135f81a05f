# SPDX-License-Identifier: Apache-2.0
"""`moe_ops tune`: find the fastest kernel configurations of a model's experts on this GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from moe_ops import tuning
from moe_ops.cli import experts
from moe_ops.configs import cache
from moe_ops.configs.device import device_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experts.add_arguments(parser, " ".join(map(str, tuning.NUM_TOKENS)))
    experts.add_separate_ops(parser)
    parser.add_argument(
        "--output", type=Path, metavar="TABLE.json", help="also write, or add to, this table"
    )


def tune(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[str]:
    """Tune, and return what to print."""
    experts.check_arguments(options, parser)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"expected --output in an existing folder, got {options.output}")
    try:
        if not cache.is_enabled():
            raise RuntimeError("MOE_OPS_AUTOTUNE=0 turns tuning off")
        layers = experts.experts_of(options)
        num_tokens = options.num_tokens or tuning.NUM_TOKENS
        device = tuning.current_device()
        facts = device_of(device)
        tasks = tuning.tasks_of(layers, num_tokens, options.separate_ops, facts)
        configs = tuning.tune_tasks(tasks, device, report=tuning.Report(progress=True))
        name = facts.name
        if options.output is not None:
            cache.write_table(options.output, name, configs)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        reason = str(error).partition("\n")[0].removeprefix("moe_ops.tune: ")
        raise SystemExit(f"{parser.prog}: {reason}") from error
    return [f"{len(configs)} configurations for {name} in {options.output or cache.path_of(name)}"]
