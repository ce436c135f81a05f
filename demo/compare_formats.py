# SPDX-License-Identifier: Apache-2.0
"""Compare the losses of LoRA on a bf16 base and on a base in each quantised format.

    python demo/compare_formats.py --json losses.json --plot losses.png

The model and the text are those of finetune_lora.py: a small Qwen3-MoE that was trained on Python's
sources, and whose experts get adapters for the chapters of Python's reference. Every base has the same
weights, adapters, batches and learning rates. The bases differ in their experts alone. One more run
with other adapters and batches on the bf16 base says how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

import moe_ops
from finetune_lora import Settings, add_adapters, read_chapters, trainable
from moe_ops.integrations.transformers import quantize_experts_
from moe_ops.quantization.formats import FORMATS
from train_qwen3_moe import build_model
from training.loop import BALANCE_COEF, learning_rate, make_optimizer
from training.model import evaluate, forward
from training.text import Text, heldout_batches, read_text, training_batch

# Each point of the plot is the mean of so many steps.
SMOOTHING = 10
OTHER_SEED = "bfloat16, another seed"


def take_steps(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, settings: Settings, text: Text
) -> list[float]:
    """Train for the steps of the settings; return the loss of each."""
    losses = []
    for step in range(settings.steps):
        cross_entropy, balance_loss, _ = forward(model, training_batch(text, settings, step))
        (cross_entropy + BALANCE_COEF * balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(cross_entropy.item())
    return losses


def finetune(
    base: Qwen3MoeForCausalLM, settings: Settings, text: Text, heldout: tuple[Tensor, ...]
) -> dict[str, object]:
    """Train adapters on a base; return the losses before, during and after it."""
    torch.manual_seed(settings.seed)
    model: peft.PeftModel = add_adapters(base, settings)
    before, _ = evaluate(base, heldout)
    optimizer = torch.optim.AdamW(trainable(model), settings.learning_rate, weight_decay=0.0)
    losses = take_steps(base, optimizer, settings, text)
    after, _ = evaluate(base, heldout)
    return {"heldout_before": before, "heldout_after": after, "train": losses}


def main() -> None:
    """Train each, print a table, and write the figures and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, base_steps=arguments.base_steps, context=64)
    base = build_model(settings)
    base_settings = dataclasses.replace(settings, steps=settings.base_steps, learning_rate=4e-3)
    take_steps(base, make_optimizer(base, base_settings), base_settings, read_text())
    base.bfloat16()

    text = read_chapters()
    heldout = heldout_batches(text, settings)
    results: dict[str, dict[str, object]] = {}
    print(f"{'base':<{len(OTHER_SEED)}} held-out loss before and after, nats/byte")
    for name in ("bfloat16", OTHER_SEED, *FORMATS):
        model = copy.deepcopy(base)
        if name in FORMATS:
            quantize_experts_(model, name)
        seed = settings.seed + (name == OTHER_SEED)
        results[name] = finetune(model, dataclasses.replace(settings, seed=seed), text, heldout)
        before, after = results[name]["heldout_before"], results[name]["heldout_after"]
        print(f"{name:<{len(OTHER_SEED)}} {before:.3f} {after:.3f}", flush=True)
    versions = {"moe_ops": moe_ops.__version__, "torch": torch.__version__}
    figures = {"settings": dataclasses.asdict(settings), "versions": versions, "bases": results}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures) + "\n")
    if arguments.plot is not None:
        draw(figures, arguments.plot)


def draw(figures: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Plot each base's training loss."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, result in figures["bases"].items():
        losses = result["train"]
        starts = range(0, len(losses) - SMOOTHING + 1, SMOOTHING)
        means = [statistics.fmean(losses[start : start + SMOOTHING]) for start in starts]
        axes.plot([start + SMOOTHING / 2 for start in starts], means, label=name)
    axes.set(xlabel="step", ylabel="training loss, nats/byte")
    axes.legend(title="experts of the base")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
