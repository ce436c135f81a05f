# SPDX-License-Identifier: Apache-2.0
"""What a run is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from training.text import MIN_HELDOUT_BYTES


def option(default: float, text: str) -> Any:
    """A field of Settings, and the command-line option of that name."""
    return dataclasses.field(default=default, metadata={"help": f"{text} (default: {default})"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is. A checkpoint holds them, so --resume can only go on with the same run."""

    steps: int = option(800, "optimizer steps")
    batch_size: int = option(8, "windows in a batch; 32 on a GPU")
    context: int = option(256, "bytes in a window")
    hidden_size: int = option(128, "width of the model, a multiple of 64")
    intermediate_size: int = option(128, "width of an expert")
    num_layers: int = option(2, "decoder layers")
    num_experts: int = option(8, "experts in a layer")
    top_k: int = option(2, "experts that each token goes to")
    learning_rate: float = option(4e-3, "peak learning rate")
    seed: int = option(0, "seed of the weights, the batches and the sample")
    device: str = "cpu"


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def check(settings: Settings) -> None:
    """Raises ValueError if no run can have these settings."""
    for name in ("steps", "batch_size", "intermediate_size", "num_layers", "num_experts", "top_k"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {getattr(settings, name)}")
    if not 2 <= settings.context <= MIN_HELDOUT_BYTES:
        raise ValueError(f"--context must be from 2 to {MIN_HELDOUT_BYTES}, got {settings.context}")
    if settings.hidden_size < 64 or settings.hidden_size % 64:
        raise ValueError(f"--hidden-size must be a multiple of 64, got {settings.hidden_size}")
    if settings.top_k > settings.num_experts:
        raise ValueError(
            f"--top-k must be at most --num-experts ({settings.num_experts}), got {settings.top_k}"
        )
    if not 0 < settings.learning_rate < math.inf:
        raise ValueError(f"--learning-rate must be above 0, got {settings.learning_rate}")
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {settings.seed}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
