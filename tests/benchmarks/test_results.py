# SPDX-License-Identifier: Apache-2.0
"""What a benchmark writes down beside its numbers, and what the tables say of it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        text = "\n".join(report.cpu_tables(tmp_path))
        assert "| bf16 | same | dX | 1 | 0.800 | 0.800 | 0.800 | 1 |" in text
        assert ("found wrong" in text) == (said is not None)
        assert said is None or f"Left out, since a result was found wrong: {said}." in text


def test_a_resumed_run_that_is_cut_short_loses_nothing(tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    arguments = ["gemm", "--dtypes", "bf16", "--num-experts", "8", "--hidden-sizes", "256"]
    arguments += ["--repeats", "2", "--threads", "1", "--default-malloc", "--output", str(output)]
    asked: list[cpu.Case] = []

    def run(case, repeats):
        asked.append(case)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "run_gemm", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    parser = argparse.Namespace(
        dtypes=["bf16"], num_experts=[8], hidden_sizes=[256], rows=(1024, 4096), counts=("same",)
    )
    first, second, third, *_ = cpu.gemm_cases(parser)
    before = [{**case, "pass": "dX", "ratio": [2.0, 2.0, 2.0]} for case in (first, third)]
    timing.write(output, {"repeats": 2}, before)
    monkeypatch.setattr(sys, "argv", ["benchmarks.cpu", *arguments, "--resume"])
    with pytest.raises(KeyboardInterrupt):
        cpu.main()
    assert asked == [second]
    _, records = timing.read(output)
    assert records == before
    monkeypatch.setattr(sys, "argv", ["benchmarks.cpu", *arguments, "--resume", "--repeats", "3"])
    with pytest.raises(SystemExit):
        cpu.main()
