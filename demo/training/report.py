# SPDX-License-Identifier: Apache-2.0
"""Say what is trained and what came out of it, and plot the losses and the experts' load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch._dynamo.utils import counters

from training.compiler import Compiler
from training.loop import Run
from training.model import evaluate, imbalance, sample
from training.settings import Settings
from training.text import Text, bigram_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def describe(run: Run, settings: Settings, text: Text, compiler: Compiler) -> None:
    """Say what is about to be trained, on what and how."""
    num_parameters = sum(p.numel() for p in run.model.parameters())
    idle = (settings.num_experts - settings.top_k) / settings.num_experts
    experts = [p for name, p in run.model.named_parameters() if ".experts." in name]
    num_active = num_parameters - int(idle * sum(p.numel() for p in experts))
    dtype = "bf16 autocast" if settings.device == "cuda" else "fp32"
    print(
        f"text      Python {sys.version_info.major}.{sys.version_info.minor} standard library: "
        f"{len(text.train):,} bytes to train on, {len(text.heldout):,} held out\n"
        f"model     Qwen3-MoE: {settings.num_layers} layers of {settings.num_experts} experts, "
        f"top-{settings.top_k}; {num_parameters:,} parameters, {num_active:,} active per token\n"
        f"training  {settings.steps} steps of {settings.batch_size} x {settings.context} bytes, "
        f"{dtype} on {settings.device}, torch.compile(fullgraph=True) with {compiler.name}\n"
        "load      max/mean: tokens of a layer's busiest expert over its experts' mean, "
        "1.00 is perfect"
    )
    print_start(run, settings, compiler)


def print_start(run: Run, settings: Settings, compiler: Compiler) -> None:
    """Say how the run starts. Nothing is printed while the first step compiles."""
    if compiler.problem:
        print(f"compiler  {compiler.problem}; aot_eager does without, only slower")
    if run.step:
        print(f"resuming  after step {run.step}")
    if run.step < settings.steps:
        duration = "seconds" if compiler.problem else "about a minute on 2 CPU cores"
        print(f"compiling in the first step: {duration}, then the progress bar moves")
    sys.stdout.flush()


def report(
    run: Run, settings: Settings, heldout: Sequence[Tensor], compiler: Compiler, output_dir: Path
) -> int:
    """Say what came out of it; return the exit status."""
    before = run.heldout_losses[0]
    after, expert_loads = evaluate(run.model, heldout)
    run.heldout_losses[run.step] = after
    bigram = bigram_entropy(heldout)
    print(f"\nsample\n{sample(run.model, settings)}\n")

    print_moe_ops(compiler)
    print("\nheld-out text")
    print(f"  loss before training   {before:.3f} nats/byte")
    print(f"  loss after training    {after:.3f} nats/byte")
    print(f"  bigram entropy         {bigram:.3f} nats/byte (no bigram model's loss is lower)")
    print(f"  max/mean expert load   {imbalance(expert_loads):.2f} (1.00 is perfect)")
    plot(run, bigram, output_dir / "loss.png")
    is_learned = after < bigram
    if is_learned:
        print("the model beats the bigram entropy")
    else:
        print("the model DOES NOT BEAT the bigram entropy; train longer (--steps)")
    return 0 if is_learned else 1


def print_moe_ops(compiler: Compiler) -> None:
    """Say which moe ops stood in the compiled graphs."""
    breaks = sum(counters["graph_break"].values())
    print(f"moe ops in the graphs given to {compiler.name} ({breaks} graph breaks)")
    for direction, graphs in compiler.moe_ops.items():
        for found in graphs:
            ops = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
            print(f"  {direction:9} {ops or 'none'}")
    if not compiler.moe_ops["forward"]:
        print("  nothing was compiled: the resumed run was already complete")


def plot(run: Run, bigram: float, path: Path) -> None:
    """Draw the losses and the load over the steps, if matplotlib is here to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"  loss curve             skipped: {error}")
        return
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes, load_axes = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    axes.plot(
        range(1, run.step + 1), run.train_losses, color="C0", alpha=0.6, label="training batch"
    )
    steps = sorted(run.heldout_losses)
    losses = [run.heldout_losses[step] for step in steps]
    axes.plot(steps, losses, "o", color="C1", label="held-out text")
    axes.axhline(bigram, color="black", linestyle="--", label="bigram entropy of the held-out text")
    axes.set(ylabel="loss (nats per byte)", title="Qwen3-MoE on torch.ops.moe.*")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    plot_load(run, load_axes)
    figure.savefig(path, dpi=120)
    print(f"  loss curve             {path}")


def plot_load(run: Run, axes: Axes) -> None:
    """Draw each layer's busiest expert over its experts' mean, by training step."""
    steps = range(run.step - len(run.imbalances) + 1, run.step + 1)
    for layer, values in enumerate(zip(*run.imbalances, strict=True)):
        axes.plot(steps, values, color=f"C{layer}", linewidth=0.8, label=f"layer {layer}")
    axes.axhline(1, color="black", linestyle="--")
    axes.set(xlabel="step", ylabel="expert load, max/mean")
    axes.set_ylim(bottom=0.9)
    axes.grid(alpha=0.3)
    if run.imbalances:
        axes.legend()
