# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from training.checkpoint import load_checkpoint
from training.settings import Settings, check, flag
from training.startup import fail

DEFAULT_OUTPUT_DIR = Path("runs/train_qwen3_moe")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message."""
        fail(message)


def parse_arguments(description: str) -> tuple[Settings, Path, dict[str, Any] | None]:
    """The settings of the run, where its output goes, and the checkpoint that it resumes, if any."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
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
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"for loss.png and checkpoint.pt (default: {DEFAULT_OUTPUT_DIR}, or that of --resume)",
    )
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on with this run")
    given = vars(parser.parse_args())
    output_dir, resume = given.pop("output_dir"), given.pop("resume")

    checkpoint = None
    try:
        if resume is None:
            on_gpu = given.get("device", "cuda") == "cuda" and torch.cuda.is_available()
            defaults: dict[str, Any] = {"device": "cuda", "batch_size": 32} if on_gpu else {}
            settings = Settings(**defaults | given)
        else:
            checkpoint = load_checkpoint(resume)
            settings = Settings(**checkpoint["settings"])
            for name, value in given.items():
                if value != (before := getattr(settings, name)):
                    raise ValueError(f"{flag(name)} {value}: the run to resume has {before}")
        check(settings)
        output_dir = output_dir or (resume.parent if resume else DEFAULT_OUTPUT_DIR)
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --output-dir: cannot write to {output_dir}: {error.strerror}")
    return settings, output_dir, checkpoint
