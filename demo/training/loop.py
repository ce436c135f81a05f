# SPDX-License-Identifier: Apache-2.0
"""Train: the steps, the optimizer, the progress bar, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3MoeForCausalLM

from training.compiler import Compiler
from training.model import evaluate, forward, imbalances
from training.settings import Settings
from training.text import Text, training_batch

BALANCE_COEF = 0.03
NUM_EVALUATIONS = 8


@dataclasses.dataclass
class Run:
    """Hold all that training changes. A checkpoint is this and the settings."""

    model: Qwen3MoeForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    train_losses: list[float] = dataclasses.field(default_factory=list)
    heldout_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    # One list a step, with one number for each layer.
    imbalances: list[list[float]] = dataclasses.field(default_factory=list)


def make_optimizer(model: Qwen3MoeForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    """Make an AdamW that decays the matrices and not the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, settings: Settings) -> float:
    """Go up in the first 20 steps, stay level, go down to zero in the second half."""
    up, down = (step + 1) / 20, 2 * (1 - step / settings.steps)
    return settings.learning_rate * min(1.0, up, down)


def train(
    run: Run, settings: Settings, text: Text, heldout: Sequence[Tensor], compiler: Compiler
) -> bool:
    """Take the steps that are left; return False if Ctrl-C ended them early."""
    compiled_forward = torch.compile(forward, fullgraph=True, backend=compiler)
    step_seconds: deque[float] = deque(maxlen=20)
    with CtrlC() as ctrl_c, progress_bar(run, settings) as bar:
        while run.step < settings.steps and not ctrl_c.pressed:
            started = time.perf_counter()
            tokens = training_batch(text, settings, run.step)
            try:
                cross_entropy, balance_loss, expert_loads = compiled_forward(run.model, tokens)
                (cross_entropy + BALANCE_COEF * balance_loss).backward()
            except Exception:
                # Ctrl-C ends a C++ compiler at work, too. The weights are those of the last step.
                if ctrl_c.pressed:
                    break
                raise
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, settings)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.step += 1
            run.train_losses.append(cross_entropy.item())
            run.imbalances.append(imbalances(expert_loads))

            if ctrl_c.is_compiling:
                ctrl_c.is_compiling = False
                count_compiled_step(bar)
            else:
                step_seconds.append(time.perf_counter() - started)
                tokens_per_second = tokens.numel() / statistics.median(step_seconds)
                bar.set_postfix_str(
                    f"loss {run.train_losses[-1]:.3f}, {tokens_per_second:,.0f} tokens/s, "
                    f"load {statistics.fmean(run.imbalances[-1]):.2f}",
                    refresh=False,
                )
                bar.update()
            if run.step % max(1, settings.steps // NUM_EVALUATIONS) == 0:
                run.heldout_losses[run.step], _ = evaluate(run.model, heldout)
    return run.step == settings.steps


def progress_bar(run: Run, settings: Settings) -> tqdm[NoReturn]:
    """Make a bar that redraws itself on a terminal, and adds a line now and then to a log."""
    columns, lines = shutil.get_terminal_size()
    return tqdm(
        total=settings.steps,
        initial=run.step,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        # In 80 columns the default run's bar has ten cells.
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ncols=columns,
        nrows=lines,
    )


def count_compiled_step(bar: tqdm[NoReturn]) -> None:
    """Count the first step; the clock starts after it, since no other step compiles."""
    bar.unpause()
    bar.n += 1
    bar.initial = bar.last_print_n = bar.n
    bar.refresh()


class CtrlC:
    """Let a step end before Ctrl-C takes effect. A second Ctrl-C does not wait."""

    pressed = False
    is_compiling = True  # in the first step

    def __enter__(self) -> CtrlC:
        self.default_handler = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.default_handler)

    def press(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        self.pressed = True
        signal.signal(signal.SIGINT, self.default_handler)
        step = "this step, which compiles first" if self.is_compiling else "this step"
        tqdm.write(f"Ctrl-C: stopping after {step} (again: at once)", file=sys.stderr)
