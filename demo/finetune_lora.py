# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the experts of a small Qwen3-MoE with PEFT's LoRA, compiled, without merged weights.

    python demo/finetune_lora.py

A model of transformers' Qwen3MoeForCausalLM is first trained a little on the sources of Python's
standard library, as train_qwen3_moe.py does it. Then its weights are frozen, PEFT puts adapters on
the experts' projections, and these are trained on other text: the chapters of Python's reference that
`help()` shows. They come with Python, too. Two lines in add_adapters put the adapters on moe_ops.

Exit status: 0 if the loss on held-out chapters falls and the merged model's logits equal those of the
model with adapters, 1 if not, 2 if it cannot start (bad arguments, a missing package), and 130 after
Ctrl-C, which leaves a checkpoint for --resume once the adapters are being trained.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import ClassVar

from training.startup import exit_with, packages

with packages("pip install -e '.[demo,peft]' installs it"):
    import peft
    import torch
    from torch import Tensor, nn
    from transformers import Qwen3MoeForCausalLM

    from moe_ops.integrations.peft import enable
    from train_qwen3_moe import build_model
    from training import settings as base_settings
    from training.checkpoint import restore, train_and_save
    from training.command_line import parse_arguments
    from training.compiler import Compiler
    from training.loop import BALANCE_COEF, Run, make_optimizer, train
    from training.model import evaluate, forward
    from training.report import print_moe_ops, print_start
    from training.settings import option
    from training.startup import fail
    from training.text import Text, heldout_batches, make_text, read_text

# Merging rounds each weight once. A wrong merge is off by parts of the whole.
MERGED_TOLERANCE = 1e-4
MB = 1e6


def add_adapters(base: Qwen3MoeForCausalLM, settings: Settings) -> peft.PeftModel:
    """Freeze the model and put adapters on its experts, in place; return PEFT's view of it."""
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # any number will do
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    # The two lines that matter.
    model = peft.get_peft_model(base, config)
    enable(model)
    return model


@dataclasses.dataclass(frozen=True)
class Settings(base_settings.Settings):
    """Add the adapters to the settings of the base model's training, and change its sizes."""

    program: ClassVar[str] = "finetune_lora"

    steps: int = option(120, "optimizer steps with adapters")
    base_steps: int = option(120, "optimizer steps that train the base model before")
    batch_size: int = option(8, "windows in a batch; 32 on a GPU")
    context: int = option(128, "bytes in a window")
    hidden_size: int = option(64, "width of the model, a multiple of 64")
    intermediate_size: int = option(128, "width of an expert")
    learning_rate: float = option(1e-2, "peak learning rate")
    rank: int = option(8, "rank of the adapters")
    lora_alpha: float = option(16.0, "the adapters are scaled by this over the rank")

    def check(self) -> None:
        """Raise ValueError if no run can have these settings."""
        super().check()
        if self.base_steps < 1:
            raise ValueError(f"--base-steps must be at least 1, got {self.base_steps}")
        if self.rank < 1:
            raise ValueError(f"--rank must be at least 1, got {self.rank}")
        # The product of wider factors has no higher rank.
        if self.rank > (most := min(self.hidden_size, self.intermediate_size)):
            sizes = "--hidden-size and --intermediate-size"
            raise ValueError(
                f"--rank must be at most the lesser of {sizes} ({most}), got {self.rank}"
            )
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora-alpha must be above 0, got {self.lora_alpha}")


def main() -> int:
    """Train and report; return the exit status."""
    settings, output_dir, checkpoint = parse_arguments(
        Settings, (__doc__ or "").partition("\n")[0], output_files="checkpoint.pt"
    )
    text = read_chapters()
    heldout = heldout_batches(text, settings)
    base = build_model(settings)
    if checkpoint is None and not train_base(base, settings):
        print("stopped while the base model was trained; nothing is kept")
        return 130
    model = add_adapters(base, settings)
    run = Run(base, torch.optim.AdamW(trainable(base), settings.learning_rate, weight_decay=0.0))
    if checkpoint is not None:
        restore(run, checkpoint, text, "Python's reference")
    heldout_loss, _ = evaluate(base, heldout)
    run.heldout_losses.setdefault(0, heldout_loss)

    compiler = Compiler()
    describe(run, settings, text, compiler)
    if not train_and_save(run, settings, text, heldout, compiler, output_dir):
        return 130
    return report(run, model, heldout, compiler)


def read_chapters() -> Text:
    """Read what help() says on the language and hold out one chapter in eight."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fail("this Python has no pydoc_data, whose text the adapters are trained on")
    train, heldout = bytearray(), bytearray()
    for name, chapter in sorted(topics.items()):
        is_heldout = zlib.crc32(name.encode()) % 8 == 0
        (heldout if is_heldout else train).extend(chapter.encode())
    return make_text(train, heldout)


def train_base(model: Qwen3MoeForCausalLM, settings: Settings) -> bool:
    """Train all weights a little on Python's sources; return False if Ctrl-C ended it early."""
    text = read_text()
    settings = dataclasses.replace(settings, steps=settings.base_steps, learning_rate=4e-3)
    run = Run(model, make_optimizer(model, settings))
    heldout = heldout_batches(text, settings)
    before, _ = evaluate(model, heldout)
    print(f"base      training all weights on Python's sources, {settings.steps} steps")
    compiler = Compiler()
    compiler.name = "aot_eager"  # these few steps would not pay Inductor's minute
    if not train(run, settings, text, heldout, compiler):
        return False
    after, _ = evaluate(model, heldout)
    print(f"          held-out loss {before:.3f}, then {after:.3f} nats/byte")
    torch._dynamo.reset()
    return True


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def gradients_of_a_step(model: Qwen3MoeForCausalLM, tokens: Tensor) -> list[Tensor]:
    """Return every gradient that a backward leaves behind."""
    model.zero_grad()
    cross_entropy, balance_loss, _ = forward(model, tokens)
    (cross_entropy + BALANCE_COEF * balance_loss).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double()


def describe(run: Run, settings: Settings, text: Text, compiler: Compiler) -> None:
    """Say what is about to be trained, on what and how."""
    total, adapters = num_bytes(list(run.model.parameters())), num_bytes(trainable(run.model))
    print(
        f"text      Python's reference: {len(text.train):,} bytes to train on, "
        f"{len(text.heldout):,} held out\n"
        f"model     Qwen3-MoE: {settings.num_layers} layers of {settings.num_experts} experts, "
        f"top-{settings.top_k}\n"
        f"adapters  rank {settings.rank} on gate_up_proj and down_proj of every expert: "
        f"{adapters / MB:.2f} MB to train, {total / MB:.2f} MB in all\n"
        f"training  {settings.steps} steps of {settings.batch_size} x {settings.context} bytes on "
        f"{settings.device}, torch.compile(fullgraph=True) with {compiler.name}"
    )
    print_start(run, settings, compiler)


def report(
    run: Run,
    model: peft.PeftModel,
    heldout: Sequence[Tensor],
    compiler: Compiler,
) -> int:
    """Say what came out of it, and merge the adapters; return the exit status."""
    before = run.heldout_losses[0]
    after, _ = evaluate(run.model, heldout)
    print()
    print_moe_ops(compiler)
    gradients = gradients_of_a_step(run.model, heldout[0])
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    print("\nmemory")
    print(f"  frozen weights         {num_bytes(frozen) / MB:.2f} MB")
    print(f"  adapters               {num_bytes(trainable(run.model)) / MB:.2f} MB")
    print(f"  gradients              {num_bytes(gradients) / MB:.2f} MB")
    if heldout[0].is_cuda:
        print(f"  peak on the GPU        {torch.cuda.max_memory_allocated() / MB:.2f} MB")

    run.model.eval()
    split = logits_of(run.model, heldout[0])
    merged = logits_of(model.merge_and_unload(), heldout[0])
    error = float((merged - split).norm() / split.norm())
    is_same, is_learned = error <= MERGED_TOLERANCE, after < before
    print("\nheld-out chapters")
    print(f"  loss before adapters   {before:.3f} nats/byte")
    print(f"  loss with adapters     {after:.3f} nats/byte")
    print(
        f"  merged model's logits  {'equal' if is_same else 'DIFFERENT'}, relative error {error:.1e}"
    )
    return 0 if is_same and is_learned else 1


if __name__ == "__main__":
    exit_with(main)
