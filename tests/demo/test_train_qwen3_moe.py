# SPDX-License-Identifier: Apache-2.0
"""The demo prints and exits as it should, and can be interrupted and resumed."""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import train_qwen3_moe
from training import loop
from training.model import imbalance, imbalances, load_balancing_loss
from training.report import plot
from training.settings import Settings
from training.text import bigram_entropy, read_text, training_batch

SCRIPT = Path(__file__).resolve().parents[2] / "demo" / "train_qwen3_moe.py"

# It has one layer of four narrow experts, so a step takes milliseconds.
TINY = (
    *("--num-layers", "1", "--hidden-size", "64", "--intermediate-size", "64"),
    *("--num-experts", "4", "--context", "64", "--device", "cpu"),
)
FORWARD_OPS = {"moe.fused_experts_forward.default": 1}
BACKWARD_OPS = {
    "moe.fused_experts_down_backward.default": 1,
    "moe.fused_experts_up_backward.default": 1,
}


@pytest.fixture
def run_demo(no_network, monkeypatch, tmp_path, capsys):
    """Return a function that calls the demo's main, and returns its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    done = collections.namedtuple("done", "status out err")

    def run(*arguments):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            status: Any = train_qwen3_moe.main()
        except SystemExit as error:
            status = error.code
        return done(status, *capsys.readouterr())

    return run


def ops_in_report(out, direction):
    lines = [
        line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(f"  {direction} ")
    ]
    return [
        {name: int(count) for count, name in (entry.split() for entry in line.split(", "))}
        for line in lines
    ]


def number(out, label):
    (value,) = re.findall(rf"^  {re.escape(label)} +([\d.]+)", out, re.MULTILINE)
    return float(value)


def test_beats_bigram(run_demo, no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    learn = ("--steps", 200, "--batch-size", 32, "--learning-rate", 1e-2)
    done = run_demo(*TINY, *learn, "--output-dir", tmp_path / "a/b")
    assert done.status == 0, done.out
    assert "with aot_eager" in done.out
    assert "Inductor has no C++ compiler: /nonexistent does not run" in done.out
    before, after = (
        number(done.out, "loss before training"),
        number(done.out, "loss after training"),
    )
    bigram = number(done.out, "bigram entropy")
    assert after < bigram < before
    assert math.log(256) < before < 7
    assert 1 <= number(done.out, "max/mean expert load") < 2
    assert "(0 graph breaks)" in done.out
    assert ops_in_report(done.out, "forward") == [FORWARD_OPS]
    assert ops_in_report(done.out, "backward") == [BACKWARD_OPS]
    assert "\ndef read_config(path):" in done.out
    assert "compiling in the first step: seconds" in done.out
    for part in ("200/200", "loss ", "tokens/s", "load "):
        assert part in done.err
    bars = [line.split("|") for line in re.split("[\r\n]+", done.err) if "tokens/s" in line]
    assert bars
    assert all(len(cells) >= 10 for _, cells, _ in bars), done.err
    png = (tmp_path / "a/b/loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    imbalances = load(tmp_path / "a/b")["imbalances"]
    assert len(imbalances) == 200
    assert all(len(step) == 1 and 1 <= step[0] <= 4 for step in imbalances)

    # The checkpoint of the complete run gives the same report, trains and compiles nothing.
    again = run_demo("--resume", tmp_path / "a/b/checkpoint.pt")
    assert again.status == 0
    assert number(again.out, "loss after training") == after
    assert "nothing was compiled" in again.out
    assert "compiling" not in again.out


def test_bar_forgets_the_step_that_compiles(monkeypatch, capsys):
    """A step takes two seconds after one that took a hundred. 4 of 24 were resumed, 20 are left."""
    now = 0.0

    def clock():
        nonlocal now
        now += 1e-6
        return now

    monkeypatch.setattr("tqdm.std.time", clock)
    run = loop.Run(None, None, step=4)  # type: ignore[arg-type]
    with loop.progress_bar(run, Settings(steps=24)) as bar:
        bar.mininterval = 1
        now += 100
        loop.count_compiled_step(bar)
        first = capsys.readouterr().err
        assert "5/24 [00:00<?]" in first
        for _ in range(4):
            now += 2
            bar.update()
        assert "9/24 [00:08<00:30]" in capsys.readouterr().err


def test_too_few_steps_and_no_matplotlib(run_demo, no_compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run_demo(*TINY, "--steps", 2)
    assert done.status == 1
    assert "the model DOES NOT BEAT the bigram entropy; train longer (--steps)\n" in done.out
    assert re.search(r"loss curve +skipped: .*matplotlib", done.out)
    assert not Path("runs/train_qwen3_moe/loss.png").exists()


@pytest.mark.slow
def test_inductor(run_demo, tmp_path):
    """Inductor gets the same ops as aot_eager and gives the same losses."""
    losses = []
    for name, compilers in (("inductor", (None, "g++")), ("aot_eager", (None, "/nonexistent"))):
        with torch._inductor.config.patch({"cpp.cxx": compilers}):
            done = run_demo(*TINY, "--steps", 3, "--batch-size", 2, "--output-dir", tmp_path / name)
        assert f"with {name}" in done.out
        assert "(0 graph breaks)" in done.out
        assert ops_in_report(done.out, "forward") == [FORWARD_OPS]
        assert ops_in_report(done.out, "backward") == [BACKWARD_OPS]
        losses.append(load(tmp_path / name)["train_losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


USES_THE_CACHES = """
import sys, torch, moe_ops
sys.path.insert(0, sys.argv[1])
from training.compiler import Compiler

for _ in range(2):
    torch._dynamo.reset()
    compiler = Compiler()
    permute = torch.compile(moe_ops.permute, fullgraph=True, backend=compiler)
    slots = torch.arange(8, dtype=torch.int32)
    permute(torch.randn(4, 16, requires_grad=True), slots, 2).sum().backward()
    print({direction: [dict(ops) for ops in graphs] for direction, graphs in compiler.moe_ops.items()})
"""


@pytest.mark.slow
def test_graphs_are_read_when_caches_are_warm(tmp_path):
    """This takes a process of its own, because the tests' environment turns the caches off."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    done = subprocess.run(
        [sys.executable, "-c", USES_THE_CACHES, SCRIPT.parent],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {"forward": [{"moe.permute.default": 1}], "backward": [{"moe.unpermute.default": 1}]}
    assert done.stdout.splitlines() == [str(found)] * 2


def load(output_dir):
    return torch.load(output_dir / "checkpoint.pt", weights_only=True)


def test_resumed_run_equals_uninterrupted(run_demo, no_compiler, monkeypatch, tmp_path):
    settings = (*TINY, "--steps", 16, "--batch-size", 2, "--seed", 5)
    run_demo(*settings, "--output-dir", tmp_path / "whole")

    def press_ctrl_c_in_step_6(text, settings, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return training_batch(text, settings, step)

    monkeypatch.setattr(loop, "training_batch", press_ctrl_c_in_step_6)
    stopped = run_demo(*settings, "--output-dir", tmp_path / "parts")
    assert stopped.status == 130
    assert "stopped after step 6 of 16" in stopped.out
    assert "Ctrl-C: stopping after this step (again: at once)" in stopped.err
    assert f"--resume {tmp_path / 'parts' / 'checkpoint.pt'}" in stopped.out
    assert load(tmp_path / "parts")["step"] == 6
    monkeypatch.setattr(loop, "training_batch", training_batch)
    resumed = run_demo("--resume", tmp_path / "parts" / "checkpoint.pt")
    assert "resuming  after step 6" in resumed.out

    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert len(whole["train_losses"]) == 16
    assert len(set(whole["train_losses"])) == 16
    assert parts["train_losses"] == whole["train_losses"]
    assert parts["heldout_losses"] == whole["heldout_losses"]
    assert parts["imbalances"] == whole["imbalances"]
    for name, tensor in whole["model"].items():
        assert torch.equal(parts["model"][name], tensor), name


def test_seed_decides(run_demo, no_compiler, tmp_path):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_demo(*TINY, "--steps", 2, "--seed", seed, "--output-dir", tmp_path / name)
        losses.append(load(tmp_path / name)["train_losses"])
    assert losses[0] == losses[1] != losses[2]


def test_ctrl_c(tmp_path):
    """As on a terminal, the whole process group gets the signal, here before the first step."""
    process: Any = subprocess.Popen(
        [sys.executable, SCRIPT, *TINY, "--steps", "100000", "--output-dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CXX": "/nonexistent"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        seen = b""
        while b"0/100000" not in seen:
            byte = process.stderr.read(1)
            assert byte, seen
            seen += byte
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert b"Ctrl-C: stopping after this step, which compiles first (again: at once)" in err
    assert re.search(rb"stopped after step \d+ of 100000; go on with\n.*--resume out/", out)
    assert load(tmp_path / "out")["settings"]["steps"] == 100000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.pt"]


BAD_ARGUMENTS = {
    "--steps 0": "--steps must be at least 1, got 0",
    "--steps many": "argument --steps: invalid int value: 'many'",
    "--batch-size -1": "--batch-size must be at least 1, got -1",
    "--top-k 9": "--top-k must be at most --num-experts (8), got 9",
    "--top-k 5 --num-experts 4": "--top-k must be at most --num-experts (4), got 5",
    "--context 1": "--context must be from 2",
    "--hidden-size 100": "--hidden-size must be a multiple of 64, got 100",
    "--learning-rate nan": "--learning-rate must be above 0, got nan",
    "--learning-rate 0": "--learning-rate must be above 0, got 0.0",
    "--seed -1": "--seed must be from 0",
    "--device tpu": "argument --device: invalid choice: 'tpu'",
    "--step 5": "unrecognized arguments: --step 5",
    "--output-dir file/below": "--output-dir: cannot write to file/below: Not a directory",
    "--output-dir file": "--output-dir: cannot write to file: File exists",
    "--resume missing.pt": "missing.pt: No such file or directory",
    "--resume .": "Is a directory",
    "--resume file": "file is not a checkpoint of this script",
    "--resume empty": "empty is not a checkpoint of this script",
    "--resume foreign.pt": "foreign.pt is not a checkpoint of this script",
    "--resume truncated.pt": "truncated.pt is not a checkpoint of this script",
    "--resume good.pt --steps 7": "--steps 7: the run to resume has 800",
    "--resume other_text.pt": "another Python's standard library",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_rejects_bad_arguments(run_demo, tmp_path, arguments):
    Path("file").write_text("a few words that are no checkpoint at all")
    Path("empty").touch()
    torch.save({"model": {}, "step": 3}, "foreign.pt")
    checkpoint = {"format": Settings.checkpoint_format(), "text_checksum": 0}
    torch.save({**checkpoint, "settings": dataclasses.asdict(Settings())}, "good.pt")
    torch.save({**checkpoint, "settings": dataclasses.asdict(Settings())}, "other_text.pt")
    Path("truncated.pt").write_bytes(Path("good.pt").read_bytes()[:-100])
    done = run_demo(*arguments.split())
    assert done.status == 2
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train_qwen3_moe.py: ")
    assert BAD_ARGUMENTS[arguments] in lines[0]


def test_rejects_unserialized_objects(run_demo, tmp_path):
    """A checkpoint is data. One that would run code when it is loaded is refused."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), "evil.pt")
    done = run_demo("--resume", "evil.pt")
    assert done.status == 2
    assert "not a checkpoint" in done.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_rejects_cuda_without_gpu(run_demo):
    done = run_demo("--device", "cuda")
    assert (done.status, done.err) == (2, "train_qwen3_moe.py: --device cuda: torch sees no GPU\n")


WITHOUT_TQDM = """
import runpy, sys
sys.modules["tqdm"] = None
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def test_names_missing_package(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_TQDM,
            SCRIPT.parent,
            SCRIPT,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "train_qwen3_moe.py: no package tqdm here; `make demo` installs it\n"


def test_splits_text_by_file(run_demo, monkeypatch, tmp_path):
    library = tmp_path / "lib"
    for folder in ("", "json", "test", "json/tests", "site-packages/numpy"):
        (library / folder).mkdir(parents=True, exist_ok=True)
        for index in range(60):
            name = f"m{index}.py"
            (library / folder / name).write_text(f"<{folder}/{name}>".ljust(12_000, "x"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    text = read_text()
    names = [re.findall(rb"<([^>]*)>", bytes(side.tolist())) for side in (text.train, text.heldout)]
    assert not set(names[0]) & set(names[1])
    expected = {f"{folder}/m{i}.py".encode() for folder in ("", "json") for i in range(60)}
    assert sorted(names[0] + names[1]) == sorted(expected)
    assert 1 <= len(names[1]) <= 20
    assert read_text().checksum == text.checksum

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library / "json"))
    with pytest.raises(SystemExit) as exit_info:
        read_text()
    assert exit_info.value.code == 2


def test_the_plot_has_every_layer(monkeypatch, tmp_path):
    """It has the losses above, and below them one line for each layer's load."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    save = Figure.savefig

    def savefig(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    run: Any = types.SimpleNamespace(
        step=3,
        train_losses=[5.0, 4.0, 3.0],
        heldout_losses={0: 6.0, 3: 3.5},
        imbalances=[[1.5, 2.0, 1.75], [1.25, 3.0, 1.5], [1.0, 2.5, 1.25]],
    )
    plot(run, 2.5, tmp_path / "loss.png")
    losses, loads = (
        {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
        for axes in figures[0].axes
    )
    assert losses["training batch"] == [[1, 5], [2, 4], [3, 3]]
    assert losses["held-out text"] == [[0, 6], [3, 3.5]]
    layers = {label: points for label, points in loads.items() if label.startswith("layer")}
    assert layers == {
        "layer 0": [[1, 1.5], [2, 1.25], [3, 1]],
        "layer 1": [[1, 2], [2, 3], [3, 2.5]],
        "layer 2": [[1, 1.75], [2, 1.5], [3, 1.25]],
    }
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bigram_entropy():
    tokens = torch.randint(5, (7, 40)) ** 2
    pairs = collections.Counter(
        (a, b) for row in tokens.tolist() for a, b in itertools.pairwise(row)
    )
    firsts: collections.Counter[int] = collections.Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    total = pairs.total()
    expected = -sum(n / total * math.log(n / firsts[first]) for (first, _), n in pairs.items())
    assert bigram_entropy(tokens.split(2)) == pytest.approx(expected, rel=1e-12)
    assert bigram_entropy([torch.tensor([[1, 2] * 20])]) == pytest.approx(0, abs=1e-12)


def test_load_balancing_loss():
    """For one layer it is transformers' own divided by top_k. Even loads give 1."""
    logits = torch.randn(100, 6)
    probs = logits.softmax(-1)[None]
    loads = torch.nn.functional.one_hot(probs.topk(2).indices, 6).sum((1, 2))
    expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2) / 2
    torch.testing.assert_close(load_balancing_loss(probs, loads), expected)
    # Two layers that are each hot on another expert do not make up for each other.
    hot = torch.eye(2)[:, None, :].expand(2, 10, 2)
    assert load_balancing_loss(hot, hot.sum(1)) == 2.0
    assert load_balancing_loss(torch.full((1, 8, 2), 0.5), torch.tensor([[8, 8]])) == 1.0


def test_imbalance():
    expert_loads = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    assert imbalances(expert_loads) == [1, 4]
    assert imbalance(expert_loads) == (1 + 4) / 2
