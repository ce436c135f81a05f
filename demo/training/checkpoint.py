# SPDX-License-Identifier: Apache-2.0
"""Saving a run, and going on with it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from training.loop import Run
from training.settings import Settings
from training.text import Text

CHECKPOINT_FORMAT = "moe_ops train_qwen3_moe 1"


def save_checkpoint(
    path: Path, run: Run, settings: Settings, text: Text, checkpoint_format: str = CHECKPOINT_FORMAT
) -> None:
    """Writes it whole or not at all: what was there stays until the new one is complete."""
    checkpoint = {
        "format": checkpoint_format,
        "settings": dataclasses.asdict(settings),
        "text_checksum": text.checksum,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "train_losses": run.train_losses,
        "heldout_losses": run.heldout_losses,
    }
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_checkpoint(path: Path, checkpoint_format: str = CHECKPOINT_FORMAT) -> dict[str, Any]:
    """Reads a checkpoint; raises ValueError with the reason if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # what torch.load raises for other files depends on their bytes
        raise ValueError(f"{path} is not a checkpoint of this script") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != checkpoint_format:
        raise ValueError(f"{path} is not a checkpoint of this script")
    return checkpoint


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Puts the run where the checkpoint left it."""
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.step = checkpoint["step"]
    run.train_losses = checkpoint["train_losses"]
    run.heldout_losses = checkpoint["heldout_losses"]
