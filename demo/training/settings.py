# SPDX-License-Identifier: Apache-2.0
"""The settings of a run. They are the options of the command line, too."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

MIN_HELDOUT_BYTES = 50_000


def option(default: float, text: str) -> Any:
    """Make a field of Settings that is a command-line option, too."""
    return dataclasses.field(default=default, metadata={"help": f"{text} (default: {default})"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Say what a run is. A checkpoint holds them: --resume goes on with the same run."""

    program: ClassVar[str] = "train_qwen3_moe"

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

    def check(self) -> None:
        """Raise ValueError if no run can have these settings."""
        for name in (
            "steps",
            "batch_size",
            "intermediate_size",
            "num_layers",
            "num_experts",
            "top_k",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.context <= MIN_HELDOUT_BYTES:
            raise ValueError(f"--context must be from 2 to {MIN_HELDOUT_BYTES}, got {self.context}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(f"--hidden-size must be a multiple of 64, got {self.hidden_size}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"--top-k must be at most --num-experts ({self.num_experts}), got {self.top_k}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU")

    @classmethod
    def checkpoint_format(cls) -> str:
        """Return what the program's checkpoints are marked with."""
        return f"moe_ops {cls.program} 1"


def flag(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")
