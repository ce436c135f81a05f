# SPDX-License-Identifier: Apache-2.0
"""Save a run, and go on with it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.compiler import Compiler
from training.loop import Run, train
from training.settings import Settings
from training.startup import fail
from training.text import Text


def train_and_save(
    run: Run,
    settings: Settings,
    text: Text,
    heldout: Sequence[Tensor],
    compiler: Compiler,
    output_dir: Path,
) -> bool:
    """Take the steps that are left and save the run; return False if Ctrl-C ended them early."""
    is_complete = train(run, settings, text, heldout, compiler)
    path = output_dir / "checkpoint.pt"
    save_checkpoint(path, run, settings, text)
    if not is_complete:
        command = shlex.join([sys.executable, sys.argv[0], "--resume", str(path)])
        print(f"stopped after step {run.step} of {settings.steps}; go on with\n  {command}")
    return is_complete


def save_checkpoint(path: Path, run: Run, settings: Settings, text: Text) -> None:
    """Write it whole or not at all: what was there stays until the new one is complete."""
    checkpoint = {
        "format": settings.checkpoint_format(),
        "settings": dataclasses.asdict(settings),
        "text_checksum": text.checksum,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "train_losses": run.train_losses,
        "heldout_losses": run.heldout_losses,
        "imbalances": run.imbalances,
    }
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_checkpoint(path: Path, checkpoint_format: str) -> dict[str, Any]:
    """Read a checkpoint; raise ValueError with the reason if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # what torch.load raises for other files depends on their bytes
        raise ValueError(f"{path} is not a checkpoint of this script") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != checkpoint_format:
        raise ValueError(f"{path} is not a checkpoint of this script")
    return checkpoint


def restore(run: Run, checkpoint: dict[str, Any], text: Text, name_of_text: str) -> None:
    """Put the run where the checkpoint left it; fail if that one was trained on another text."""
    if checkpoint["text_checksum"] != text.checksum:
        fail(f"--resume: the checkpoint was trained on another {name_of_text}")
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.step = checkpoint["step"]
    run.train_losses = checkpoint["train_losses"]
    run.heldout_losses = checkpoint["heldout_losses"]
    # Checkpoints of before the demo drew them have none.
    run.imbalances = checkpoint.get("imbalances", [])
