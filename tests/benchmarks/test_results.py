# SPDX-License-Identifier: Apache-2.0
"""A benchmark writes down more than its numbers, and the tables show it."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cpu, report, timing

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gemm", "experts"])
def test_environment(what, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the experts are transformers'")
    output = tmp_path / "cpu.json"
    arguments = (
        "--repeats",
        "2",
        "--dtypes",
        "fp32",
        "--rows",
        "8",
        "--num-experts",
        "8",
        "--hidden-sizes",
        "16",
    )
    subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", what, *arguments, "--output", output],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    result = json.loads(output.read_text())
    assert result["cases"]
    assert result["environment"]["repeats"] == 2
    expected = transformers.__version__ if what == "experts" else None
    assert result["environment"].get("transformers") == expected


def test_tables_count_what_they_leave_out(tmp_path):
    case = {"dtype": "bf16", "counts": "same", "pass": "dX", "E": 8, "H": 256}
    wrong = [{**case, "wrong": names} for names in (["peer"], ["moe_ops", "peer"])]
    right = [{**case, "ratio": [0.7, 0.8, 0.9]}]
    for cases, said in ((right, None), (right + wrong, "2 cases (moe_ops 1, peer 2)")):
        (tmp_path / "cpu_gemm.json").write_text(json.dumps({"environment": {}, "cases": cases}))
        text = "\n".join(report.cpu_page(tmp_path))
        assert "| bf16 | same | dX | 1 | 0.800 | 0.800 | 0.800 | 1 |" in text
        assert ("found wrong" in text) == (said is not None)
        assert said is None or f"Left out, since a result was found wrong: {said}." in text


def visit(*times, ours=1.0, others=0.0, error=1e-7, **more):
    """Return what a round finds of a case, given torch's times. Ours are all the same."""
    milliseconds = {"moe_ops": [ours] * len(times), "peer": list(times)}
    errors = {"moe_ops": error, "peer": 1e-7}
    return {"pass": "dX", "errors": errors, "others": others, "milliseconds": milliseconds} | more


def test_summary_is_of_the_turns_of_all_rounds():
    rounds = [visit(2.0, 4.0, others=0.1), visit(6.0, error=3e-7), visit(8.0, 10.0, others=0.5)]
    record = timing.summary(rounds)
    assert record["ratio"] == [4.0, 6.0, 8.0]
    assert record["milliseconds"] == {"moe_ops": [1.0, 1.0, 1.0], "peer": [4.0, 6.0, 8.0]}
    assert record["others"] == 0.2
    assert record["errors"] == {"moe_ops": 3e-7, "peer": 1e-7}
    assert record["pass"] == "dX"


@pytest.mark.parametrize("error", [1.0, math.nan])
def test_summary_of_what_was_wrong_once_has_no_ratio(error):
    wrong = {"pass": "dX", "errors": {"moe_ops": error, "peer": 1e-7}, "wrong": ["moe_ops"]}
    for rounds in ([wrong, visit(1.0)], [visit(1.0), wrong, visit(1.0)]):
        record = timing.summary(rounds)
        assert record["wrong"] == ["moe_ops"]
        assert "ratio" not in record
        assert record["errors"]["moe_ops"] == pytest.approx(error, nan_ok=True)


class Benchmark:
    """Calls the CLI on four cases of 8 experts, with a function that stands for measuring."""

    def __init__(self, folder, monkeypatch):
        self.output = folder / "results.json"
        self.log = folder / "results.visits.jsonl"
        self.monkeypatch = monkeypatch

    def __call__(self, run, *arguments):
        command = ["benchmarks.cpu", "gemm", "--dtypes", "bf16", "--num-experts", "8"]
        command += ["--hidden-sizes", "256", "--rows", "1024", "--threads", "1"]
        command += ["--default-malloc", "--output", str(self.output), *arguments]
        self.monkeypatch.setattr(sys, "argv", command)
        self.monkeypatch.setattr(cpu, "run_gemm", run)
        cpu.main()
        return json.loads(self.output.read_text())


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return Benchmark(tmp_path, monkeypatch)


def are_of(records, cases):
    return [{**record, **case} for record, case in zip(records, cases, strict=True)] == records


def test_repeats_are_spread_over_rounds_of_all_cases(benchmark):
    asked: list[tuple[int, cpu.Case]] = []

    def run(case, turns):
        asked.append((turns, case))
        return [{**case, **visit(*range(len(asked), len(asked) + turns))}]

    result = benchmark(run, "--repeats", "7", "--rounds", "3")
    cases = [case for _, case in asked[:4]]
    assert [turns for turns, _ in asked] == [3] * 4 + [2] * 8
    assert [case for _, case in asked] == cases * 3
    assert len({json.dumps(case) for case in cases}) == 4
    # The first case takes 1, 2, 3, then 5, 6, then 9, 10 times our time.
    assert result["cases"][0]["ratio"] == [2.5, 5.0, 7.5]
    assert are_of(result["cases"], cases)
    assert result["environment"]["rounds"] == 3
    assert not benchmark.log.exists()


def test_a_run_that_is_cut_short_goes_on_from_its_visits(benchmark):
    cut_after = 6
    asked: list[cpu.Case] = []

    def run(case, turns):
        if len(asked) == cut_after:
            raise KeyboardInterrupt
        asked.append(case)
        return [{**case, **visit(*[float(len(asked))] * turns)}]

    repeats = ("--repeats", "2", "--rounds", "2")
    with pytest.raises(KeyboardInterrupt):
        benchmark(run, *repeats)
    assert not benchmark.output.exists()
    # The run was killed in the middle of a line.
    with benchmark.log.open("a") as file:
        file.write('[1, {"dtype"')
    with pytest.raises(SystemExit):
        benchmark(run, "--repeats", "3", "--rounds", "2", "--resume")
    cut_after = 7
    with pytest.raises(KeyboardInterrupt):
        benchmark(run, *repeats, "--resume")
    cut_after = 8
    result = benchmark(run, *repeats, "--resume")
    cases = asked[:4]
    assert asked == cases * 2
    assert [record["ratio"][1] for record in result["cases"]] == [3.0, 4.0, 5.0, 6.0]
    assert not benchmark.log.exists()


def test_resume_refuses_what_was_measured_otherwise(benchmark):
    def cut(case, turns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(cut, "--repeats", "2")
    for other in (("--repeats", "3"), ("--repeats", "2", "--rounds", "1")):
        with pytest.raises(SystemExit):
            benchmark(cut, *other, "--resume")
    with pytest.raises(SystemExit):
        benchmark(cut, "--repeats", "2", "--threads", "2", "--resume")


def test_resume_keeps_the_visits_of_other_cases(benchmark):
    asked: list[cpu.Case] = []

    def run(case, turns):
        asked.append(case)
        return [{**case, **visit(*[2.0] * turns)}]

    def cut(case, turns):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(case, turns)

    with pytest.raises(KeyboardInterrupt):
        benchmark(cut, "--repeats", "1", "--rows", "8", "16")
    benchmark(run, "--repeats", "1", "--rows", "16", "--resume")
    assert benchmark.log.exists()
    benchmark(run, "--repeats", "1", "--rows", "8", "16", "--resume")
    assert len(asked) == 8
    assert not benchmark.log.exists()


class CountsOfCalls(TorchDispatchMode):
    """Lists the experts' counts that moe_ops' ops are called with, or counts the ids they get."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts, self.met = num_experts, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe":
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            which = next(t for t in tensors if not t.is_floating_point())
            if which.dim() == 2:
                which = which.flatten().bincount(minlength=self.num_experts)
            self.met.append(tuple(which.tolist()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["gemm", "fused"])
def test_no_turn_meets_counts_that_were_met_before(what, monkeypatch):
    arguments = argparse.Namespace(
        dtypes=["fp32"], num_experts=[8], hidden_sizes=[16], rows=[64], counts=["new"],
        modes=["eager"],
    )  # fmt: skip
    cases, run = {
        "gemm": (cpu.gemm_cases, cpu.run_gemm), "fused": (cpu.experts_cases, cpu.run_fused)
    }[what]  # fmt: skip
    first = []

    def take_turns(contenders, turns):
        for turn in range(turns + timing.WARM_UPS):
            with CountsOfCalls(num_experts=8) as calls:
                contenders[timing.OURS](turn)
            first.append(calls.met[0])
        return {name: [1.0] * turns for name in contenders}

    monkeypatch.setattr(timing, "_take_turns", take_turns)
    assert list(run(next(iter(cases(arguments))), 5))
    assert len(first) >= 14
    assert {(len(counts), sum(counts)) for counts in first} == {(8, 64)}
    assert len(set(first)) == len(first)


def test_visits_beside_other_processes_are_left_out_and_repeated(benchmark, monkeypatch):
    monkeypatch.setattr(timing, "others_now", lambda: 0.0)
    busy = True
    asked: list[cpu.Case] = []

    def run(case, turns):
        asked.append(case)
        return [{**case, **visit(*[2.0] * turns, others=0.5 * (busy and len(asked) == 6))}]

    limit = ("--repeats", "2", "--rounds", "2", "--others", "0.3")
    result = benchmark(run, *limit)
    cases = asked[:4]
    assert are_of(result["cases"], [cases[0], *cases[2:]])
    busy = False
    result = benchmark(run, *limit, "--resume")
    assert asked[8:] == cases[1:2]
    assert are_of(result["cases"], cases)
