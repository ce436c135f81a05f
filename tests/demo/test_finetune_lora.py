# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning demo prints what it should, and can be interrupted and resumed."""

import collections
import dataclasses
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft

import finetune_lora
from training import loop
from training import settings as base_settings
from training import text as texts
from training.text import training_batch

SCRIPT = Path(__file__).resolve().parents[2] / "demo" / "finetune_lora.py"

# It has one layer of four narrow experts, so a step takes milliseconds.
TINY = (
    *("--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64", "--rank", "4"),
    *("--num-experts", "4", "--context", "32", "--base-steps", "2", "--device", "cpu"),
)
# The whole lines: no other op computes anything of the experts, such as a dW of the base.
FORWARD_OPS = "  forward   1 moe.fused_experts_lora_forward.default\n"
BACKWARD_OPS = "  backward  1 moe.fused_experts_lora_backward.default\n"


@pytest.fixture
def run_demo(no_network, monkeypatch, tmp_path, capsys):
    """Return a function that calls the demo's main, and returns its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    # A short run would spend most of its time on evaluations.
    monkeypatch.setattr(texts, "NUM_HELDOUT_WINDOWS", 16)
    done = collections.namedtuple("done", "status out err")

    def run(*arguments):
        torch._dynamo.reset()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            status: Any = finetune_lora.main()
        except SystemExit as error:
            status = error.code
        return done(status, *capsys.readouterr())

    return run


@pytest.fixture
def random_base(monkeypatch):
    """Take the base model as it is drawn, which saves compiling its training."""
    monkeypatch.setattr(finetune_lora, "train_base", lambda model, settings: True)


def number(out, label):
    (value,) = re.findall(rf"^  {re.escape(label)} +([\d.]+)", out, re.MULTILINE)
    return float(value)


def load(output_dir):
    return torch.load(output_dir / "checkpoint.pt", weights_only=True)


def test_learns_and_merges(run_demo, no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    done = run_demo(*TINY, "--steps", 20, "--output-dir", tmp_path / "out")
    assert done.status == 0, done.out
    assert number(done.out, "loss with adapters") < number(done.out, "loss before adapters")
    assert "merged model's logits  equal" in done.out
    assert FORWARD_OPS in done.out
    assert BACKWARD_OPS in done.out
    for part in ("20/20", "loss ", "tokens/s"):
        assert part in done.err

    # 4 experts, rank 4, widths 64 and 128, both projections have lora_A and lora_B in fp32.
    adapters = 4 * 4 * 4 * ((64 + 128) + (64 + 64)) / 1e6
    assert number(done.out, "adapters") == pytest.approx(adapters, abs=0.005)
    assert number(done.out, "gradients") == pytest.approx(adapters, abs=0.005)
    assert f"{adapters:.2f} MB to train" in done.out
    assert number(done.out, "frozen weights") > adapters

    # The checkpoint of the complete run gives the same report, and trains nothing.
    again = run_demo("--resume", tmp_path / "out/checkpoint.pt")
    assert again.status == 0
    for label in ("loss before adapters", "loss with adapters"):
        assert number(again.out, label) == number(done.out, label)
    assert "base " not in again.out
    assert "compiling" not in again.out

    # Merged weights that are off by a thousandth do not pass.
    def merge_and_unload(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1.001)
        return self

    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", merge_and_unload, raising=False)
    spoiled = run_demo("--resume", tmp_path / "out/checkpoint.pt")
    assert spoiled.status == 1
    assert "merged model's logits  DIFFERENT" in spoiled.out


@pytest.mark.slow
def test_inductor_equals_aot_eager(run_demo, random_base, tmp_path):
    losses = []
    for name, compiler in (("inductor", "g++"), ("aot_eager", "/nonexistent")):
        # The C++ of scalar kernels compiles in a fraction of the time.
        with torch._inductor.config.patch({"cpp.cxx": (None, compiler), "cpp.simdlen": 1}):
            output_dir = tmp_path / name
            done = run_demo(*TINY, "--steps", 3, "--batch-size", 2, "--output-dir", output_dir)
        assert f"with {name}" in done.out
        assert BACKWARD_OPS in done.out
        assert "merged model's logits  equal" in done.out
        losses.append(load(output_dir)["train_losses"])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resumed_run_equals_uninterrupted(
    run_demo, random_base, no_compiler, monkeypatch, tmp_path
):
    settings = (*TINY, "--steps", 8, "--batch-size", 2, "--seed", 5)
    run_demo(*settings, "--output-dir", tmp_path / "whole")

    def press_ctrl_c_in_step_4(text, settings, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return training_batch(text, settings, step)

    monkeypatch.setattr(loop, "training_batch", press_ctrl_c_in_step_4)
    stopped = run_demo(*settings, "--output-dir", tmp_path / "parts")
    monkeypatch.setattr(loop, "training_batch", training_batch)
    assert stopped.status == 130
    assert "stopped after step 4 of 8" in stopped.out
    assert f"--resume {tmp_path / 'parts' / 'checkpoint.pt'}" in stopped.out
    resumed = run_demo("--resume", tmp_path / "parts" / "checkpoint.pt")
    assert "resuming  after step 4" in resumed.out

    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert len(set(whole["train_losses"])) == 8
    assert parts["train_losses"] == whole["train_losses"]
    assert parts["heldout_losses"] == whole["heldout_losses"]
    changed = 0
    for name, tensor in whole["model"].items():
        assert torch.equal(parts["model"][name], tensor), name
        changed += "lora_B" in name and bool(tensor.any())
    assert changed == 2


def test_ctrl_c_while_the_base_is_trained(run_demo, no_compiler, monkeypatch, tmp_path):
    def press_ctrl_c(text, settings, step):
        signal.raise_signal(signal.SIGINT)
        return torch.zeros(1, settings.context, dtype=torch.int64)

    monkeypatch.setattr(loop, "training_batch", press_ctrl_c)
    done = run_demo(*TINY, "--steps", 2, "--output-dir", tmp_path / "out")
    assert done.status == 130
    assert "nothing is kept" in done.out
    assert not list((tmp_path / "out").iterdir())


BAD_ARGUMENTS = {
    "--steps 0": "--steps must be at least 1, got 0",
    "--base-steps 0": "--base-steps must be at least 1, got 0",
    "--rank 0": "--rank must be at least 1, got 0",
    "--rank 100000000": (
        "--rank must be at most the lesser of --hidden-size and --intermediate-size (64), "
        "got 100000000"
    ),
    "--rank 33 --hidden-size 64 --intermediate-size 32": "--intermediate-size (32), got 33",
    "--rank few": "argument --rank: invalid int value: 'few'",
    "--lora-alpha 0": "--lora-alpha must be above 0, got 0.0",
    "--lora-alpha nan": "--lora-alpha must be above 0, got nan",
    "--top-k 9": "--top-k must be at most --num-experts (8), got 9",
    "--device tpu": "argument --device: invalid choice: 'tpu'",
    "--ranks 5": "unrecognized arguments: --ranks 5",
    "--output-dir file": "--output-dir: cannot write to file: File exists",
    "--resume missing.pt": "missing.pt: No such file or directory",
    "--resume file": "file is not a checkpoint of this script",
    "--resume demo.pt": "demo.pt is not a checkpoint of this script",
    "--resume good.pt --rank 7": "--rank 7: the run to resume has 8",
    "--resume good.pt": "another Python's reference",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_rejects_bad_arguments(run_demo, arguments):
    Path("file").write_text("a few words that are no checkpoint at all")
    torch.save({"format": base_settings.Settings.checkpoint_format()}, "demo.pt")
    settings = dataclasses.asdict(finetune_lora.Settings())
    good = {
        "format": finetune_lora.Settings.checkpoint_format(),
        "text_checksum": 0,
        "settings": settings,
    }
    torch.save(good, "good.pt")
    done = run_demo(*arguments.split())
    assert done.status == 2
    lines = done.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("finetune_lora.py: ")
    assert BAD_ARGUMENTS[arguments] in lines[0]


def test_chapters_are_split():
    """No chapter is on both sides, and no chapter is lost."""
    from pydoc_data.topics import topics

    text = finetune_lora.read_chapters()
    train, heldout = (bytes(side.tolist()) for side in (text.train, text.heldout))
    assert len(train) + len(heldout) == sum(len(topic.encode()) for topic in topics.values())
    for topic in topics.values():
        assert (topic.encode() in train) != (topic.encode() in heldout) or len(topic) < 100
