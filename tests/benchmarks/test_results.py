# SPDX-License-Identifier: Apache-2.0
"""What a benchmark writes down beside its numbers, and what the tables say of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

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
