# SPDX-License-Identifier: Apache-2.0
"""Train a small Qwen3-MoE on real text, compiled, with its experts on torch.ops.moe.*.

    python demo/train_qwen3_moe.py

The model is transformers' Qwen3MoeForCausalLM; build_model has the two lines that put its experts
on moe_ops. The text is the sources of Python's standard library, which every machine has, as bytes;
one file in twenty is held out. Nothing is downloaded.

Exit status: 0 if the held-out loss ends below the bigram entropy of the held-out text, 1 if it does
not, 2 if it cannot start (bad arguments, a missing package), and 130 after Ctrl-C, which leaves a
checkpoint for --resume.
"""

from __future__ import annotations

import shlex
import sys

from training.startup import exit_with, packages

with packages("`make demo` installs it"):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

    from moe_ops.integrations.transformers import register
    from training.checkpoint import restore, save_checkpoint
    from training.command_line import parse_arguments
    from training.compiler import Compiler
    from training.loop import Run, make_optimizer, train
    from training.model import evaluate, make_config
    from training.report import describe, report
    from training.settings import Settings
    from training.startup import fail
    from training.text import heldout_batches, read_text


def build_model(settings: Settings) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights, its experts on torch.ops.moe.*."""
    torch.manual_seed(settings.seed)
    register()
    model = AutoModelForCausalLM.from_config(
        make_config(settings), experts_implementation="moe_ops"
    )
    return model.to(settings.device)


def main() -> int:
    """Trains and reports; returns the exit status."""
    settings, output_dir, checkpoint = parse_arguments((__doc__ or "").partition("\n")[0])
    text = read_text()
    heldout = heldout_batches(text, settings)

    model = build_model(settings)
    run = Run(model, make_optimizer(model, settings))
    if checkpoint is not None:
        if checkpoint["text_checksum"] != text.checksum:
            fail("--resume: the checkpoint was trained on another Python's standard library")
        restore(run, checkpoint)
    # In a resumed run, too: transformers' hooks that catch the router's logits are put in place by a
    # first forward, and cannot be while it is compiled.
    heldout_loss, _ = evaluate(model, heldout)
    run.heldout_losses.setdefault(0, heldout_loss)

    compiler = Compiler()
    describe(run, settings, text, compiler)
    is_complete = train(run, settings, text, heldout, compiler)
    checkpoint_path = output_dir / "checkpoint.pt"
    save_checkpoint(checkpoint_path, run, settings, text)
    if not is_complete:
        command = shlex.join([sys.executable, sys.argv[0], "--resume", str(checkpoint_path)])
        print(f"stopped after step {run.step} of {settings.steps}; go on with\n  {command}")
        return 130
    return report(run, settings, heldout, compiler, output_dir)


if __name__ == "__main__":
    exit_with(main)
