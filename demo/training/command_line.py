# SPDX-License-Identifier: Apache-2.0
"""Read the command line."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from training.checkpoint import load_checkpoint
from training.settings import Settings, flag
from training.startup import fail

SettingsT = TypeVar("SettingsT", bound=Settings)


class OneLineParser(argparse.ArgumentParser):
    """Parse arguments, with errors of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        fail(message)


def parse_arguments(
    settings_class: type[SettingsT], description: str, output_files: str
) -> tuple[SettingsT, Path, dict[str, Any] | None]:
    """Return the settings, where the output goes, and the checkpoint to resume or None."""
    default_output_dir = Path("runs", settings_class.program)
    parser = make_parser(settings_class, description)
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"for {output_files} (default: {default_output_dir}, or that of --resume)",
    )
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on with this run")
    given = vars(parser.parse_args())
    output_dir, resume = given.pop("output_dir"), given.pop("resume")

    checkpoint = None
    try:
        if resume is None:
            on_gpu = given.get("device", "cuda") == "cuda" and torch.cuda.is_available()
            defaults: dict[str, Any] = {"device": "cuda", "batch_size": 32} if on_gpu else {}
            settings = settings_class(**defaults | given)
        else:
            checkpoint = load_checkpoint(resume, settings_class.checkpoint_format())
            settings = settings_class(**checkpoint["settings"])
            for name, value in given.items():
                if value != (before := getattr(settings, name)):
                    raise ValueError(f"{flag(name)} {value}: the run to resume has {before}")
        settings.check()
        output_dir = output_dir or (resume.parent if resume else default_output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --output-dir: cannot write to {output_dir}: {error.strerror}")
    return settings, output_dir, checkpoint


def make_parser(settings_class: type[Settings], description: str) -> OneLineParser:
    """Make a parser with an option for each setting."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(settings_class):
        if "help" in field.metadata:
            parser.add_argument(
                flag(field.name),
                type=type(field.default),
                default=argparse.SUPPRESS,
                metavar="N" if isinstance(field.default, int) else "X",
                help=field.metadata["help"],
            )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=argparse.SUPPRESS,
        help="(default: cuda if torch sees a GPU, else cpu)",
    )
    return parser
