# SPDX-License-Identifier: Apache-2.0
"""The examples are short and compiled, and exit with an error if their claim is false."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# What a script prints, and the ops that it calls if it is not compiled.
EXPERTS = {
    "moe::fused_experts",
    "moe::fused_experts_down_backward",
    "moe::fused_experts_up_backward",
}
GROUPED_GEMM = {
    "moe::routing_indices",
    "moe::grouped_gemm",
    "moe::grouped_gemm_dx",
    "moe::unpermute",
}
SCRIPTS = {
    "ops": ([r"fused +loss", r"separate +loss"], {"moe::topk_routing", *EXPERTS, *GROUPED_GEMM}),
    "transformers_model": ([rf"step {step}  loss" for step in range(10)], EXPERTS),
    "qlora": (
        [
            r"gate_up_proj 4.13 bits",
            "trainable params: 28,672 ",
            *(rf"step {step}  loss" for step in range(10)),
            "loaded again, loss",
        ],
        {"moe::fused_experts_lora_quantized", "moe::fused_experts_lora_quantized_backward"},
    ),
    "lora": (
        ["trainable params: 14,336 ", *(rf"step {step}  loss" for step in range(10))],
        {"moe::fused_experts_lora", "moe::fused_experts_lora_backward"},
    ),
}
# They need the peft extra.
PEFT = ("lora", "qlora")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Give all scripts one empty cache, because two of them compile many of the same kernels."""
    environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path_factory.mktemp("inductor")))
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    return environment


@pytest.fixture
def run_here(request, monkeypatch):
    """Run a script in this process, not compiled, and return its exit status and its moe ops."""
    if request.param in PEFT:
        pytest.importorskip("peft", reason="the peft extra is not installed")
    monkeypatch.setattr(torch, "compile", lambda layer, fullgraph: layer)

    def run():
        status = None
        with torch.profiler.profile() as profile:
            try:
                runpy.run_path(str(EXAMPLES / f"{request.param}.py"), run_name="__main__")
            except SystemExit as error:
                status = error.code
        names = {event.key for event in profile.key_averages() if event.key.startswith("moe::")}
        return status, names, SCRIPTS[request.param][1]

    return run


def test_all_are_tested():
    # It runs on several ranks, and has a test module of its own.
    others = {"train_expert_parallel"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | others


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short(name):
    lines = len((EXAMPLES / f"{name}.py").read_text().splitlines())
    assert lines <= (80 if name == "qlora" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_compiled(environment, tmp_path, name):
    if name in PEFT:
        pytest.importorskip("peft", reason="the peft extra is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(SCRIPTS[name][0]), done.stdout
    for pattern, line in zip(SCRIPTS[name][0], lines, strict=True):
        assert re.match(pattern, line)
    losses = [float(loss) for loss in re.findall(r"(?:loss|->) (\d+\.\d+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_here", SCRIPTS, indirect=True)
def test_ops_of_a_step(run_here):
    status, ops, expected = run_here()
    assert not status
    assert ops >= expected


@pytest.mark.parametrize("run_here", SCRIPTS, indirect=True)
def test_fails_where_nothing_is_learned(run_here, monkeypatch):
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    status, _, _ = run_here()
    assert re.match("the loss did not fall", status)
