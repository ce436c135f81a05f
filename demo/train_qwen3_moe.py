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

import argparse
import dataclasses
import functools
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

# Let waiting threads sleep. Spinning, libgomp's default, is a third faster if every core is free for
# this, and several times slower if one is not.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch._dynamo.backends.debugging import aot_eager, boxed_nop
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._ops import OpOverload
    from torch.fx import GraphModule
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_ops.integrations.transformers import register
except ModuleNotFoundError as missing:
    print(
        f"train_qwen3_moe.py: no package {missing.name} here; `make demo` installs it",
        file=sys.stderr,
    )
    sys.exit(2)

VOCAB_SIZE = 256  # a token is a byte
HEAD_DIM = 32
BALANCE_COEF = 0.03
NUM_HELDOUT_WINDOWS = 128
NUM_EVALUATIONS = 8
MIN_HELDOUT_BYTES = 50_000
PROMPT = b'def read_config(path):\n    """'
DEFAULT_OUTPUT_DIR = Path("runs/train_qwen3_moe")
CHECKPOINT_FORMAT = "moe_ops train_qwen3_moe 1"


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


@dataclasses.dataclass
class Run:
    """All that training changes. A checkpoint is this and the settings."""

    model: Qwen3MoeForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    train_losses: list[float] = dataclasses.field(default_factory=list)
    heldout_losses: dict[int, float] = dataclasses.field(default_factory=dict)


def main() -> int:
    """Trains and reports; returns the exit status."""
    settings, output_dir, checkpoint = parse_arguments()
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


class Text(NamedTuple):
    """What is read, in bytes (uint8)."""

    train: Tensor
    heldout: Tensor
    checksum: int


def read_text() -> Text:
    """The sources of Python's standard library, one file in twenty held out.

    Its name decides on which side a file is: the split is by file, and the same on every machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    train, heldout = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts):
            is_heldout = zlib.crc32(name.as_posix().encode()) % 20 == 0
            (heldout if is_heldout else train).extend(path.read_bytes())
    if len(train) < 1_000_000 or len(heldout) < MIN_HELDOUT_BYTES:
        fail(f"too few Python sources to train on in {root}")
    return Text(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(heldout, dtype=torch.uint8),
        zlib.crc32(heldout, zlib.crc32(train)),
    )


def windows(text: Tensor, starts: Tensor, settings: Settings) -> Tensor:
    """The windows of text that begin at starts, as token ids (len(starts), context)."""
    positions = starts[:, None] + torch.arange(settings.context)
    return text[positions].long().to(settings.device)


def training_batch(text: Text, settings: Settings, step: int) -> Tensor:
    """The batch of a step. Seed and step decide it: resuming needs no generator's state."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    num_starts = len(text.train) - settings.context + 1
    starts = torch.randint(num_starts, (settings.batch_size,), generator=generator)
    return windows(text.train, starts, settings)


def heldout_batches(text: Text, settings: Settings) -> tuple[Tensor, ...]:
    """Windows spread evenly over the held-out text. Every evaluation is on these bytes."""
    starts = torch.linspace(0, len(text.heldout) - settings.context, NUM_HELDOUT_WINDOWS).long()
    return windows(text.heldout, starts, settings).split(settings.batch_size)


def bigram_entropy(batches: Sequence[Tensor]) -> float:
    """H(next byte | byte) of the held-out windows, from their own counts, in nats per byte.

    No bigram model has a lower loss on these bytes, not even one fitted to them; one fitted to the
    training text, which would be the fairer bar, has a higher loss.
    """
    tokens = torch.cat(tuple(batches))
    pairs = (tokens[:, :-1] * VOCAB_SIZE + tokens[:, 1:]).flatten()
    probs = torch.bincount(pairs, minlength=VOCAB_SIZE**2).double() / pairs.numel()
    probs = probs.view(VOCAB_SIZE, VOCAB_SIZE)
    return (torch.special.entr(probs).sum() - torch.special.entr(probs.sum(1)).sum()).item()


def build_model(settings: Settings) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights, its experts on torch.ops.moe.*."""
    torch.manual_seed(settings.seed)
    num_heads = settings.hidden_size // HEAD_DIM
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        moe_intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=settings.context,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
    )
    register()
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops")
    return model.to(settings.device)


def forward(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predicts every byte of the windows from those before it. This is what is compiled.

    Returns:
        cross_entropy (scalar): nats per byte.
        balance_loss (scalar): see load_balancing_loss.
        expert_loads (num_layers, num_experts): tokens that went to each expert.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        outputs = model(input_ids=tokens, output_router_logits=True, use_cache=False)
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    cross_entropy = F.cross_entropy(logits, tokens[:, 1:].flatten())
    router_probs = torch.stack(outputs.router_logits).float().softmax(-1)
    topk_ids = router_probs.topk(model.config.num_experts_per_tok).indices
    expert_loads = F.one_hot(topk_ids, model.config.num_experts).sum((1, 2))
    return cross_entropy, load_balancing_loss(router_probs, expert_loads), expert_loads


def load_balancing_loss(router_probs: Tensor, expert_loads: Tensor) -> Tensor:
    """The Switch Transformer's auxiliary loss of each layer, averaged; 1.0 if loads are even.

    The one in transformers adds up the layers' loads first, where an expert that is busy in one
    layer makes up for being idle in another.
    """
    shares = expert_loads / expert_loads.sum(-1, keepdim=True)
    return router_probs.shape[-1] * (shares * router_probs.mean(1)).sum(-1).mean()


def imbalance(expert_loads: Tensor) -> float:
    """Load of the busiest expert over the mean load, averaged over layers; 1.0 is perfect."""
    loads = expert_loads.double()
    return (loads.amax(-1) / loads.mean(-1)).mean().item()


def make_optimizer(model: Qwen3MoeForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    """AdamW that decays the matrices and not the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, settings: Settings) -> float:
    """Up in the first 20 steps, then level, down to zero in the second half."""
    up, down = (step + 1) / 20, 2 * (1 - step / settings.steps)
    return settings.learning_rate * min(1.0, up, down)


def train(
    run: Run, settings: Settings, text: Text, heldout: Sequence[Tensor], compiler: Compiler
) -> bool:
    """Takes the steps that are left; False if Ctrl-C ended them early."""
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

            if ctrl_c.is_compiling:
                ctrl_c.is_compiling = False
                count_compiled_step(bar)
            else:
                step_seconds.append(time.perf_counter() - started)
                tokens_per_second = tokens.numel() / statistics.median(step_seconds)
                bar.set_postfix_str(
                    f"loss {run.train_losses[-1]:.3f}, {tokens_per_second:,.0f} tokens/s, "
                    f"load {imbalance(expert_loads):.2f}",
                    refresh=False,
                )
                bar.update()
            if run.step % max(1, settings.steps // NUM_EVALUATIONS) == 0:
                run.heldout_losses[run.step], _ = evaluate(run.model, heldout)
    return run.step == settings.steps


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, batches: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Loss in nats per byte, and the expert loads. Not compiled: a second graph would not pay."""
    losses, loads, weights = [], [], []
    for tokens in batches:
        cross_entropy, _, expert_loads = forward(model, tokens)
        losses.append(cross_entropy.item())
        loads.append(expert_loads)
        weights.append(len(tokens))
    loss = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return loss, torch.stack(loads).sum(0)


def sample(model: Qwen3MoeForCausalLM, settings: Settings) -> str:
    """PROMPT and what the model writes after it, as much as fits into one window."""
    torch.manual_seed(settings.seed)
    prompt = torch.tensor([list(PROMPT[: settings.context // 2])], device=settings.device)
    with torch.autocast(prompt.device.type, torch.bfloat16, enabled=prompt.is_cuda):
        output = model.generate(  # type: ignore[misc]
            prompt, do_sample=True, temperature=0.7, max_length=settings.context, pad_token_id=0
        )
    return bytes(output[0].tolist()).decode(errors="replace")


def describe(run: Run, settings: Settings, text: Text, compiler: Compiler) -> None:
    """Says what is about to be trained, on what and how."""
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
    """Says what came out of it; returns the exit status."""
    before = run.heldout_losses[0]
    after, expert_loads = evaluate(run.model, heldout)
    run.heldout_losses[run.step] = after
    bigram = bigram_entropy(heldout)
    print(f"\nsample\n{sample(run.model, settings)}\n")

    breaks = sum(counters["graph_break"].values())
    print(f"moe ops in the graphs given to {compiler.name} ({breaks} graph breaks)")
    for direction, graphs in compiler.moe_ops.items():
        for found in graphs:
            ops = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
            print(f"  {direction:9} {ops or 'none'}")
    if not compiler.moe_ops["forward"]:
        print("  nothing was compiled: the resumed run was already complete")

    print("\nheld-out text")
    print(f"  loss before training   {before:.3f} nats/byte")
    print(f"  loss after training    {after:.3f} nats/byte")
    print(f"  bigram entropy         {bigram:.3f} nats/byte (no bigram model's loss is lower)")
    print(f"  max/mean expert load   {imbalance(expert_loads):.2f} (1.00 is perfect)")
    plot(run, bigram, output_dir / "loss.png")
    is_learned = after < bigram
    print(f"the model {'beats' if is_learned else 'DOES NOT BEAT'} the bigram entropy")
    return 0 if is_learned else 1


# From here on it is plumbing: the plot, the compiler, checkpoints, Ctrl-C and the command line.


def plot(run: Run, bigram: float, path: Path) -> None:
    """Draws the losses over the steps, if matplotlib is here to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"  loss curve             skipped: {error}")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        range(1, run.step + 1), run.train_losses, color="C0", alpha=0.6, label="training batch"
    )
    steps = sorted(run.heldout_losses)
    losses = [run.heldout_losses[step] for step in steps]
    axes.plot(steps, losses, "o", color="C1", label="held-out text")
    axes.axhline(bigram, color="black", linestyle="--", label="bigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Qwen3-MoE on torch.ops.moe.*")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"  loss curve             {path}")


class Compiler:
    """A torch.compile backend that counts the moe ops in what it is given to compile.

    That is AOTAutograd's graphs, forward and backward, as Inductor gets them; or, where Inductor
    cannot build its kernels, as aot_eager gets them, which runs them as they are.
    """

    def __init__(self) -> None:
        self.problem = inductor_problem()
        self.name = "aot_eager" if self.problem else "inductor"
        self.moe_ops: dict[str, list[Counter[str]]] = {"forward": [], "backward": []}

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        # A hit in AOTAutograd's cache on disk would leave no graph to read.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            if self.name == "inductor":
                return compile_fx(graph, inputs, inner_compile=self._inductor)
            return aot_eager(
                graph,
                inputs,
                fw_compiler=functools.partial(self._aot_eager, direction="forward"),
                bw_compiler=functools.partial(self._aot_eager, direction="backward"),
            )

    def _inductor(self, graph: GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        self._count("backward" if options.get("is_backward") else "forward", graph)
        return compile_fx_inner(graph, inputs, **options)

    def _aot_eager(self, graph: GraphModule, inputs: list[Tensor], direction: str) -> Any:
        self._count(direction, graph)
        return boxed_nop(graph, inputs)

    def _count(self, direction: str, graph: GraphModule) -> None:
        ops = (node.target for node in graph.graph.nodes if node.op == "call_function")
        names = (str(op) for op in ops if isinstance(op, OpOverload) and op.namespace == "moe")
        self.moe_ops[direction].append(Counter(names))


def inductor_problem() -> str | None:
    """Why Inductor cannot build its kernels on this machine; None if it can."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"Inductor has no C++ compiler: {os.environ.get('CXX', 'g++')} does not run"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Inductor needs {header}, which is not there"


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


def progress_bar(run: Run, settings: Settings) -> tqdm[NoReturn]:
    """One that redraws itself on a terminal, and adds a line now and then to a log."""
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
    """Counts the first step; the clock starts after it, since no other step compiles."""
    bar.unpause()
    bar.n += 1
    bar.initial = bar.last_print_n = bar.n
    bar.refresh()


class CtrlC:
    """Lets a step end before Ctrl-C takes effect. A second Ctrl-C does not wait."""

    pressed = False
    is_compiling = True  # in the first step

    def __enter__(self) -> CtrlC:
        self.default_handler = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.default_handler)

    def press(self, _signal: int, _frame: FrameType | None) -> None:
        """Handles the signal."""
        self.pressed = True
        signal.signal(signal.SIGINT, self.default_handler)
        step = "this step, which compiles first" if self.is_compiling else "this step"
        tqdm.write(f"Ctrl-C: stopping after {step} (again: at once)", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Exits as a command does that cannot do what it is asked to."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


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


def parse_arguments() -> tuple[Settings, Path, dict[str, Any] | None]:
    """The settings of the run, where its output goes, and the checkpoint that it resumes, if any."""
    parser = OneLineParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        if "help" in field.metadata:
            parser.add_argument(
                flag(field.name),
                type=type(field.default),
                default=argparse.SUPPRESS,
                metavar="N" if isinstance(field.default, int) else "X",
                help=field.metadata["help"],
            )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=argparse.SUPPRESS,
        help="(default: cuda if torch sees a GPU, else cpu)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"for loss.png and checkpoint.pt (default: {DEFAULT_OUTPUT_DIR}, or that of --resume)",
    )
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on with this run")
    given = vars(parser.parse_args())
    output_dir, resume = given.pop("output_dir"), given.pop("resume")

    checkpoint = None
    try:
        if resume is None:
            on_gpu = given.get("device", "cuda") == "cuda" and torch.cuda.is_available()
            defaults: dict[str, Any] = {"device": "cuda", "batch_size": 32} if on_gpu else {}
            settings = Settings(**defaults | given)
        else:
            checkpoint = load_checkpoint(resume)
            settings = Settings(**checkpoint["settings"])
            for name, value in given.items():
                if value != (before := getattr(settings, name)):
                    raise ValueError(f"{flag(name)} {value}: the run to resume has {before}")
        check(settings)
        output_dir = output_dir or (resume.parent if resume else DEFAULT_OUTPUT_DIR)
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --output-dir: cannot write to {output_dir}: {error.strerror}")
    return settings, output_dir, checkpoint


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("train_qwen3_moe.py: interrupted", file=sys.stderr)
        sys.exit(130)
