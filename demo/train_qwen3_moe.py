# SPDX-License-Identifier: Apache-2.0
"""Train a small Qwen3-MoE on real text, compiled, with its experts on torch.ops.moe.*.

    python demo/train_qwen3_moe.py

The model is transformers' Qwen3MoeForCausalLM. Two lines in build_model put its experts on moe_ops;
the rest of the program is in training/. The text is the sources of Python's standard library, which
every machine has, as bytes. One file in twenty is held out. Nothing is downloaded.

Exit status: 0 if the held-out loss ends below the bigram entropy of the held-out text, 1 if it does
not, 2 if it cannot start (bad arguments, a missing package), and 130 after Ctrl-C, which leaves a
checkpoint for --resume.
"""

from __future__ import annotations

from training.startup import exit_with, packages

with packages("`make demo` installs it"):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

    from moe_ops.integrations.transformers import register
    from training.checkpoint import restore, train_and_save
    from training.command_line import parse_arguments
    from training.compiler import Compiler
    from training.loop import Run, make_optimizer
    from training.model import evaluate, make_config
    from training.report import describe, report
    from training.settings import Settings
    from training.text import heldout_batches, read_text


def build_model(settings: Settings) -> Qwen3MoeForCausalLM:
    """Make a Qwen3-MoE with random weights whose experts run on torch.ops.moe.*."""
    torch.manual_seed(settings.seed)
    config = make_config(settings)
    # The two lines that matter.
    register()
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops")
    return model.to(settings.device)


def main() -> int:
    """Train and report; return the exit status."""
    settings, output_dir, checkpoint = parse_arguments(
        Settings, (__doc__ or "").partition("\n")[0], output_files="loss.png and checkpoint.pt"
    )
    text = read_text()
    heldout = heldout_batches(text, settings)

    model = build_model(settings)
    run = Run(model, make_optimizer(model, settings))
    if checkpoint is not None:
        restore(run, checkpoint, text, "Python's standard library")
    # In a resumed run, too: transformers puts the hooks that catch the router's logits in place in a
    # first forward, and cannot do it while that is compiled.
    heldout_loss, _ = evaluate(model, heldout)
    run.heldout_losses.setdefault(0, heldout_loss)

    compiler = Compiler()
    describe(run, settings, text, compiler)
    if not train_and_save(run, settings, text, heldout, compiler, output_dir):
        return 130
    return report(run, settings, heldout, compiler, output_dir)


if __name__ == "__main__":
    exit_with(main)
