# SPDX-License-Identifier: Apache-2.0
"""The tuning loop, on a made-up clock, picks the fastest, drops the wrong and keeps the rest."""

import contextlib
import io
import logging
import re
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

import moe_ops
from moe_ops import tuning
from moe_ops.configs import cache
from moe_ops.configs.choose import choose
from moe_ops.configs.device import device_of
from moe_ops.tuning import bench, tasks_of
from moe_ops.tuning.report import Report
from moe_ops.tuning.space import candidates
from testing.tuning_fakes import CPU, HOPPER, LAYER, TASKS, Clock, tune_on_cpu

FIRST = TASKS[0].problem
KEYS = [task.problem.key for task in TASKS]


def price(config):
    """Return a price that is as good as random. The heuristic's choice is not the cheapest."""
    return 1 + zlib.crc32(repr(config).encode()) % 9973


def break_op(monkeypatch, is_broken, how):
    """Let `how(config, output)` happen to the configurations that are broken."""
    run = bench.Bench._run

    def broken(self, config, arguments):
        outputs = run(self, config, arguments)
        return how(config, outputs) if is_broken(config) else outputs

    monkeypatch.setattr(bench.Bench, "_run", broken)


def test_picks_the_fastest():
    clock = Clock(price)
    found = tune_on_cpu(clock)
    assert list(found) == KEYS
    for task, timed in zip(TASKS, clock.timed, strict=True):
        space = candidates(task.problem, HOPPER)
        # All ran and were right, because the CPU implementation ignores a configuration.
        assert timed == set(space)
        assert found[task.problem.key] == min(space, key=price)


def test_what_is_found_is_what_launches_get():
    found = tune_on_cpu(Clock(price))
    for task in TASKS:
        assert choose(task.problem, HOPPER, None).config == found[task.problem.key]


def test_the_second_run_tunes_nothing():
    found = tune_on_cpu(Clock(price))
    clock, lines = Clock(price), io.StringIO()
    with contextlib.redirect_stderr(lines):
        assert tune_on_cpu(clock, report=Report(progress=True)) == found
    assert clock.timed == []
    assert lines.getvalue() == (
        f"moe_ops.tune: nothing to do on NVIDIA H100, {len(TASKS)} problems are tuned\n"
    )


def test_goes_on_after_a_kill():
    with pytest.raises(KeyboardInterrupt):
        tune_on_cpu(Clock(price, limit=2))
    clock = Clock(price)
    found = tune_on_cpu(clock)
    assert len(clock.timed) == len(TASKS) - 2
    assert found == {
        task.problem.key: min(candidates(task.problem, HOPPER), key=price) for task in TASKS
    }


def wrong_row(output):
    output = output.clone()
    # Only one row is wrong, one that is not zero.
    flat = output.reshape(-1, output.shape[-1])
    flat[flat.norm(dim=1).argmax()] *= 1.5
    return flat.reshape(output.shape)


@pytest.mark.parametrize(
    "how",
    [
        lambda _, outputs: (wrong_row(outputs[0]), *outputs[1:]),
        lambda _, outputs: (torch.full_like(outputs[0], float("nan")), *outputs[1:]),
    ],
    ids=["one row", "nan"],
)
def test_drops_the_wrong(how, monkeypatch, caplog):
    best = {task.problem.key: min(candidates(task.problem, HOPPER), key=price) for task in TASKS}
    break_op(monkeypatch, lambda config: config in best.values(), how)
    clock = Clock(price)
    with caplog.at_level(logging.WARNING, "moe_ops"):
        found = tune_on_cpu(clock)
    for timed in clock.timed:
        assert not timed & set(best.values())
    for task in TASKS:
        rest = set(candidates(task.problem, HOPPER)) - set(best.values())
        assert found[task.problem.key] == min(rest, key=price)
    assert sum("a row is off by" in record.message for record in caplog.records) >= len(TASKS)


def test_drops_what_turns_wrong_later(monkeypatch):
    """A race does not show in the first launch."""
    task = TASKS[0]
    first, second, *_ = sorted(candidates(task.problem, HOPPER), key=price)
    launches = []

    def later(config, outputs):
        launches.append(config)
        # These are the trial, the comparison, the clock's launch and the last comparison.
        return outputs if len(launches) < 4 else (wrong_row(outputs[0]),)

    break_op(monkeypatch, lambda config: config == first, later)
    assert tune_on_cpu(Clock(price), [task]) == {task.problem.key: second}
    assert len(launches) == 4


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, IndexError])
def test_drops_what_does_not_compile(error, monkeypatch):
    task = TASKS[0]
    first, second, *_ = sorted(candidates(task.problem, HOPPER), key=price)

    def fail(config, outputs):
        raise error("PassManager::run failed")

    break_op(monkeypatch, lambda config: config == first, fail)
    clock = Clock(price)
    assert tune_on_cpu(clock, [task]) == {task.problem.key: second}
    assert first not in clock.timed[0]


def test_nothing_is_kept_where_nothing_is_right(monkeypatch):
    lines = io.StringIO()
    break_op(monkeypatch, lambda _: True, lambda _, outputs: (wrong_row(outputs[0]), *outputs[1:]))
    with contextlib.redirect_stderr(lines):
        assert tune_on_cpu(Clock(), TASKS[:1], report=Report(progress=True)) == {}
    assert "[1/1] " in lines.getvalue()
    assert "none of" in lines.getvalue()
    assert cache.lookup(HOPPER.name, KEYS[0]) is None


def test_what_does_not_fit_is_skipped(monkeypatch):
    made = bench.Bench

    def too_large(task, device):
        if task is TASKS[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(task, device)

    monkeypatch.setattr(tuning, "Bench", too_large)
    assert list(tune_on_cpu(Clock(), TASKS[:2])) == KEYS[1:2]


def test_one_line_a_problem():
    lines = io.StringIO()
    with contextlib.redirect_stderr(lines):
        tune_on_cpu(Clock(price), report=Report(progress=True))
    head, *steps = lines.getvalue().splitlines()
    assert head == f"moe_ops.tune: {len(TASKS)} problems on NVIDIA H100, 0 were tuned before"
    assert len(steps) == len(TASKS)
    for number, (line, task) in enumerate(zip(steps, TASKS, strict=True), 1):
        space = candidates(task.problem, HOPPER)
        best = min(space, key=price)
        assert line.startswith(
            f"[{number}/{len(TASKS)}] {task.problem.key}: {tuning.describe(best)}: "
        )
        gain = re.search(r": (\S+) ms, (\S+)x the heuristic", line)
        assert gain
        assert float(gain[1]) == pytest.approx(price(best), rel=1e-3)
        assert float(gain[2]) == pytest.approx(price(space[0]) / price(best), abs=0.006)


def test_quiet_without_progress(capsys, caplog):
    with caplog.at_level(logging.INFO, "moe_ops"):
        tune_on_cpu(Clock(), TASKS[:1])
    assert capsys.readouterr() == ("", "")
    assert any(KEYS[0] in record.message for record in caplog.records)


def test_a_bar_on_a_terminal(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    assert tqdm

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tune_on_cpu(Clock(), TASKS[:2], report=Report(progress=True))
    assert "2/2" in terminal.getvalue()
    assert KEYS[1] in terminal.getvalue()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 32, 16, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(3, 16, 16, device="meta"))
        self.top_k = 2


def test_a_model(fake_gpu, capsys):
    """A user calls it with a model, and the launches get what was found."""
    found = moe_ops.tune(Model(), num_tokens=6)
    assert {key.split()[0] for key in found} == {"forward", "backward_dX", "backward_dW"}
    assert len(fake_gpu.timed) == len(found) == 6
    for task in tasks_of([LAYER], [6]):
        assert choose(task.problem, HOPPER, None).config == found[task.problem.key]
    assert "[6/6] " in capsys.readouterr().err
    assert moe_ops.tune(Model(), (6, 5), progress=False) == found
    assert len(fake_gpu.timed) == 6
    assert capsys.readouterr().err == ""
    assert len(moe_ops.tune(Model(), 6, torch.float16, progress=False).keys() - found.keys()) == 7


def test_turned_off(monkeypatch, capsys):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    assert moe_ops.tune(Model()) == {}
    assert capsys.readouterr().err == "moe_ops.tune: MOE_OPS_AUTOTUNE=0 turns tuning off\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="expected a CUDA GPU, got none that this torch sees"):
        moe_ops.tune(Model())


def test_refuses_while_tracing(monkeypatch):
    model = Model()

    @torch.compile(backend="eager", fullgraph=True)
    def step(x):
        moe_ops.tune(model)
        return x + 1

    with pytest.raises(RuntimeError, match=r"before torch\.compile traces the model"):
        step(torch.ones(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"before torch\.compile traces the model"):
        moe_ops.tune(model)


def test_the_function_is_not_hidden_by_a_module():
    script = "import moe_ops.tuning, moe_ops; print(callable(moe_ops.tune), 'triton' in __import__('sys').modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'moe_ops' has no attribute 'autotune'"):
        moe_ops.autotune  # noqa: B018


def test_facts_are_the_devices():
    """Without `facts`, what is tried must fit the device."""
    clock = Clock()
    tuning.tune_tasks(TASKS[:1], CPU, timer=clock)
    assert clock.timed == [set(candidates(FIRST, device_of(CPU)))]
