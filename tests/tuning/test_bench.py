# SPDX-License-Identifier: Apache-2.0
"""A bench makes the inputs of one problem, compares with PyTorch, and times."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import parse
from moe_ops.tuning import bench, tasks_of
from moe_ops.tuning.space import candidates
from testing.tuning_fakes import CPU, HOPPER, LAYER, TASKS

ROOT = Path(__file__).parents[2]
FIRST = TASKS[0].problem


def test_inputs_take_turns():
    made = bench.Bench(TASKS[0], CPU)
    assert len(made.inputs) > 1
    config = candidates(FIRST, HOPPER)[0]
    first, second = made.launch(config, 0), made.launch(config, 1)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(made.launch(config, len(made.inputs))[0], first[0])


def test_the_comparison_sees_one_row():
    """One wrong row does not drown among the others."""
    expected = torch.randn(1000, 64)
    actual = expected.clone()
    actual[7] *= 1.1
    assert bench._worst_row_error(actual, expected) > 0.05
    assert bench._worst_row_error(expected, expected) == 0


def test_the_comparison_sees_hard_routing():
    for task in tasks_of([replace(LAYER, num_experts=5)], [64]):
        counts = bench.Bench(task, CPU).compared["token_counts"]
        assert counts.max() > 2 * counts.float().mean()
        assert counts.min() == 0
        assert counts.sum() < task.num_rows


def test_the_string_of_the_op_holds_the_configuration():
    """Every candidate reaches the op."""
    task = TASKS[-1]
    made = bench.Bench(task, CPU)
    made.op = lambda **arguments: arguments["kernel_config"]
    for config in candidates(task.problem, HOPPER):
        (text,) = made.launch(config)
        assert parse(text) == {task.problem.kind: config}


def test_medians_of_turns(monkeypatch):
    """Times are medians without the first turn. Here only launches move the GPU's clock."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fast, slow, *_ = candidates(FIRST, HOPPER)
    turns: dict[KernelConfig, list[int]] = {fast: [], slow: []}

    def launch_of(config, milliseconds):
        def launch(turn):
            turns[config].append(turn)
            first = len(turns[config]) == 1
            # Every fourth time is disturbed.
            now[0] += 1000 if first or turn % 4 == 0 else milliseconds

        return launch

    found = bench.cuda_milliseconds({fast: launch_of(fast, 2.0), slow: launch_of(slow, 3.0)})
    assert found == {fast: pytest.approx(2.0), slow: pytest.approx(3.0)}
    # Both have the same number of turns, and never the same turn.
    assert len(turns[fast]) == len(turns[slow]) >= 6
    assert all(a != b for a, b in zip(turns[fast], turns[slow], strict=True))


INTERPRETED = """
import torch
from dataclasses import replace
from moe_ops._triton import experts, gemm, plan as planning, weight_gradient
from moe_ops.tuning.space import candidates
from moe_ops.configs.device import device_of
from moe_ops.tuning import bench, tasks_of, tune_tasks
from testing.tuning_fakes import CPU, HOPPER, LAYER, Clock

seen = []
plan = planning.plan
def recorded(problem, *rest):
    made = plan(problem, *rest)
    seen.append((problem, made.config))
    return made
planning.plan = recorded
gemm.plan_once = weight_gradient.plan_once = planning.plan_once.__wrapped__  # asked each time
# What Hopper's kernels could serve is asked for; it is interpreted in those for every GPU.
experts.device_of = lambda device: replace(HOPPER, is_interpreted=True)
layers = [
    LAYER, replace(LAYER, dtype=torch.float16, transposed=True, has_bias=True),
    replace(LAYER, weights_before=True), replace(LAYER, up=(16, 16)),
]
tasks = tasks_of(layers, [6], True, HOPPER)
assert any(t.problem.epilogue == "gated_activation_backward" for t in tasks)
for task in tasks:
    seen.clear()
    made = bench.Bench(task, CPU)
    config = candidates(task.problem, device_of(CPU))[1]
    assert made.why_fails(config) is None, task
    assert made.why_wrong(config) is None, task
    assert seen == [(task.problem, config)] * 2, (task, seen)
task = tasks[0]
found = tune_tasks([task], CPU, timer=Clock(lambda config: config.BLOCK_M * config.num_warps))
seen.clear()
bench.Bench(task, CPU).op(**bench.Bench(task, CPU).compared)
assert seen == [(task.problem, found[task.problem.key])]
"""


@pytest.mark.slow
def test_in_the_interpreter():
    """The kernels themselves compute the problem, in the configuration, and right."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "MOE_OPS_IMPLEMENTATION": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
