# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark runs without a GPU on tiny sizes, and gives wrong results no ratio."""

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations, product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import moe_ops
from benchmarks import suite
from benchmarks.cuda import experts, lora, timing
from benchmarks.cuda.__main__ import (
    BLOCKS,
    BY_NAME,
    DECODE_BLOCK,
    HOST,
    MODEL,
    PARTS,
    PEERS,
    WIDTHS,
    run_part,
    save_part,
)
from benchmarks.cuda.experts import EAGER, RECOMPUTE
from benchmarks.cuda.gemm import OURS_PERMUTED, PASSES, Gemm, few_experts
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Call,
    Captured,
    compare,
    orders,
    recorded_launches,
    relative_error,
    worst,
)

ROOT = Path(__file__).resolve().parents[2]
# These run apart, on the CPU implementation, because interpreted blocks take minutes.
EXPERTS = [part for part in PARTS if part.startswith("experts")]
LAYERS = ["lora", BLOCKS]
CEILINGS = {"dense_tflops": 800.0, "copy_tbs": 4.0, "read_tbs": 4.0}


def bench():
    return Bench(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


INTERPRETER = {"TRITON_INTERPRET": "1", "MOE_OPS_IMPLEMENTATION": "triton"}


def run_tiny(results, *options, environ=INTERPRETER):
    environ = {**os.environ, **environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.cuda", "--device", "cpu", "--tiny"]
    return subprocess.run(
        [*command, "--results", str(results), *options],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def read_results(folder, parts):
    """Return the results of the parts and the ceilings, which must be complete and right."""
    found = {}
    for part in ("ceilings", *parts):
        file = folder / f"interpreter_{part.replace('-', '_')}.json"
        found[part] = json.loads(file.read_text())
        environment = found[part]["environment"]
        assert environment["part"] == part
        assert len(environment["kernel_sha256"]) == 64
        assert environment["ceilings"]["copy_tbs"] > 0
        assert not {"failed", "left out, no time"} & set(environment)
    assert not [c for result in found.values() for c in result["cases"] if "wrong" in c]
    return found


@pytest.mark.parametrize("count", range(1, 9))
def test_each_comes_after_each_other_equally_often(count):
    found = orders(count)
    assert all(sorted(order) == list(range(count)) for order in found)
    after = Counter(pair for order in found for pair in pairwise(order))
    assert set(after) == set(permutations(range(count), 2))
    assert len(set(after.values())) <= 1


@pytest.mark.parametrize(("turns", "whole"), [(2, 2), (5, 8), (7, 8)])
def test_turns_are_whole_rounds(turns, whole):
    timed = replace(bench(), least_turns=turns)
    made: list[str] = []
    times = timed.take_turns({name: functools.partial(made.append, name) for name in "abcd"})
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abcd", whole)
    # First each runs once. Then come turns of five, of which the first is not timed.
    of_turns = [made[i : i + 5] for i in range(4, len(made), 5)]
    assert len(of_turns) == whole
    after = Counter(pair for turn in of_turns for pair in pairwise(turn))
    if whole == 8:
        assert after == dict.fromkeys(product("abcd", repeat=2), 2)


@pytest.mark.slow
def test_whole_flow(tmp_path):
    parts = [part for part in PARTS if part not in [*EXPERTS, *LAYERS, *BY_NAME]]
    done = run_tiny(tmp_path, "--only", ",".join(parts))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {part: result["cases"] for part, result in read_results(tmp_path, parts).items()}
    for part in ("gemm", "rows", "routing", "decode"):
        for case in cases[part]:
            assert case["ratio"], case
            assert all(math.isfinite(q) and q > 0 for each in case["ratio"].values() for q in each)
    assert {(c["projection"], c["pass"]) for c in cases["gemm"]} == {
        (projection, name) for projection in suite.PROJECTIONS for name in PASSES
    }
    assert set(cases["gemm"][0]["ratio"]) == {"torch", "torch permuted", "dense", "permuted"}
    assert {c["call"]: c["kernels"] for c in cases["dispatch"]}["routing_indices"] == 1
    assert [c["triton_cache"] for c in cases["first-call"]] == ["empty", "warm", "warm"]
    assert [c["when"] for c in cases["ceilings"]] == ["start", "end"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(moe_ops, "fused_experts"), reason="there is no fused_experts")
def test_flow_of_the_experts(tmp_path):
    """Only the kernel that measures a ceiling needs the interpreter."""
    done = run_tiny(tmp_path, "--only", ",".join(EXPERTS), environ={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(tmp_path, EXPERTS)
    cases = {part: result["cases"] for part, result in found.items()}
    assert len(cases["experts"]) == 4
    for case in cases["experts"]:
        assert {EAGER} <= set(case["ratio"]) <= {EAGER, "of uniform", "recompute"}
        assert {OURS, RECOMPUTE, EAGER} <= set(case["milliseconds"])
    assert "grouped_mm" in found["experts"]["environment"]
    assert [c["triton_cache"] for c in cases["experts-first-call"]] == ["empty", "warm", "warm"]
    peers = found[PEERS]["environment"]
    assert set(peers["present"]) | set(peers["absent"]) == {
        "scattermoe", "liger", "unsloth", "sonicmoe",
    }  # fmt: skip
    assert cases[PEERS] or peers["absent"]
    for name in peers["absent"]:
        assert name in done.stdout


@pytest.mark.slow
def test_flow_of_the_layers(tmp_path):
    done = run_tiny(tmp_path, "--only", ",".join(LAYERS), environ={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(tmp_path, LAYERS)
    cases = {part: result["cases"] for part, result in found.items()}
    assert [(c["layout"], c["pass"]) for c in cases["lora"]] == [
        (layout, name) for layout in lora.LAYOUTS for name in experts.PASSES
    ]
    assert len(cases[BLOCKS]) >= 2
    assert all(EAGER in c["ratio"] for part in LAYERS for c in cases[part] if "peer" not in c)
    whose = found[BLOCKS]["environment"]
    assert "grouped_mm" in whose
    assert ("unsloth" in whose["absent"]) is not ("unsloth" in whose["present"])


@pytest.mark.slow
def test_flow_of_the_parts_that_run_by_name(tmp_path):
    pytest.importorskip("transformers")
    done = run_tiny(tmp_path, "--only", ",".join(BY_NAME), environ={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(tmp_path, BY_NAME)
    cases = {part: result["cases"] for part, result in found.items()}
    assert {case["what"] for case in cases[HOST]} == {"experts", "lora", "grouped_gemm", "op"}
    assert [case["checkpoints"] for case in cases[MODEL]] == [False, True]
    assert [case["T"] for case in cases[DECODE_BLOCK]] == list(suite.TINY_DECODE_TOKENS)
    assert all(set(case["ratio"]) == {"next"} for case in cases[WIDTHS])
    assert "grouped_mm" in found[HOST]["environment"]
    assert "Qwen3MoeForCausalLM" in found[MODEL]["environment"]["model"]


@pytest.mark.slow
def test_stops_when_the_time_is_spent(tmp_path):
    done = run_tiny(tmp_path, "--only", "rows", "--seconds", "0")
    assert done.returncode == 1
    result = json.loads((tmp_path / "interpreter_rows.json").read_text())
    assert result["cases"] == []
    assert result["environment"]["left out, no time"] == ["tiny"]


def test_a_failure_is_told_and_the_rest_runs():
    def fail():
        yield {"case": 1}
        raise RuntimeError("out of memory\nand more")

    cases = [("bad", fail), ("good", lambda: [{"case": 2}])]
    records, missing = run_part(cases, math.inf)
    assert records == [{"case": 1}, {"case": 2}]
    assert missing == {"failed": {"bad": "RuntimeError: out of memory"}}


def test_a_run_that_is_ended_leaves_what_it_measured(tmp_path):
    file = tmp_path / "h200_rows.json"

    def fail():
        raise RuntimeError("out of memory")

    def be_ended():
        yield {"case": 2}
        raise KeyboardInterrupt

    cases = [("bad", fail), ("good", lambda: [{"case": 1}]), ("last", be_ended)]
    with pytest.raises(KeyboardInterrupt):
        run_part(cases, math.inf, functools.partial(save_part, file, {"part": "rows"}))
    found = json.loads(file.read_text())
    assert found["cases"] == [{"case": 1}]
    assert found["environment"] == {
        "part": "rows",
        "ended after": "good",
        "failed": {"bad": "RuntimeError: out of memory"},
    }


@pytest.mark.parametrize("error", [0.1, math.nan, math.inf])
def test_wrong_result_has_no_ratio(error):
    calls = {OURS: lambda: None, "torch": lambda: None, "dense": lambda: None}
    errors = {OURS: error, "torch": 0.0, "dense": 0.0}
    ratios = {"torch": ("torch", OURS), "dense": ("dense", "torch")}
    record = compare(bench(), calls, errors, ratios)
    assert record["wrong"] == [OURS]
    json.dumps(record, allow_nan=False)
    assert set(record["ratio"]) == {"dense"}
    assert set(record["milliseconds"]) == {"torch", "dense"}


def test_several_calls_at_once_are_told_one_by_one(monkeypatch):
    monkeypatch.setattr(Bench, "timed", lambda self, call: call)
    several = Captured(bench(), [lambda: None] * 4)
    monkeypatch.setattr(Captured, "__call__", lambda self: 8.0)
    calls: dict[str, Call] = {OURS: several, "torch": lambda: 6.0}
    record = compare(bench(), calls, dict.fromkeys(calls, 0.0), {"torch": ("torch", OURS)})
    assert record["milliseconds"][OURS] == [2.0] * 3
    assert record["ratio"]["torch"] == [3.0] * 3


@pytest.mark.parametrize("routing", suite.ROUTINGS)
@pytest.mark.parametrize("projection", suite.PROJECTIONS)
def test_gemm_is_right(routing, projection):
    gemm = Gemm(bench(), suite.TINY_SUITE[0], routing, projection)
    for name in PASSES:
        record = gemm.measure(name)
        assert "wrong" not in record, record
        assert set(record["ratio"]) == {"torch", "torch permuted", "dense", "permuted"}
        assert record["of_dense_ceiling"] >= 0


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("projection", suite.PROJECTIONS)
def test_gemm_finds_one_wrong_expert(monkeypatch, projection, name, permuted):
    gemm = Gemm(bench(), suite.TINY_SUITE[0], "hot_and_empty", projection)
    right = gemm.ours

    def ours(name, permuted):
        call = right(name, permuted)
        return (lambda: spoiled(call())) if permuted is wrong else call

    def spoiled(result):
        # The first row is wrong, or the first expert's gradient.
        return torch.cat([result[:1] * 2, result[1:]])

    wrong = permuted
    monkeypatch.setattr(gemm, "ours", ours)
    record = gemm.measure(name)
    assert (OURS_PERMUTED if permuted else OURS) in record["wrong"]
    assert ("torch permuted" if permuted else "torch") not in record["ratio"]
    assert "permuted" not in record["ratio"]


@pytest.mark.parametrize("name", PASSES)
def test_fp32_finds_one_wrong_expert_without_torch(name):
    gemm = Gemm(bench(), suite.TINY_SUITE[0], "hot_and_empty", "up")
    result = gemm.ours(name, permuted=False)()
    assert gemm.error(name, result) <= gemm.bench.tolerance
    for spoiled in (2.0, math.nan):
        wrong = torch.cat([result[:1] * spoiled, result[1:]])
        assert not gemm.error(name, wrong) <= gemm.bench.tolerance
    if name == "dW":
        # The last expert has no rows.
        assert not gemm.error(name, torch.cat([result[:-1], result[:1]])) <= gemm.bench.tolerance


def test_few_experts():
    assert few_experts(torch.tensor([3, 0, 9, 1, 0, 4, 0])) == [2, 3, 5, 6]
    assert few_experts(torch.tensor([2, 2])) == [0, 1]


def test_relative_error():
    expected = torch.randn(6, 4)
    assert relative_error(expected, expected) == 0
    assert relative_error(2 * expected, expected) == pytest.approx(1)
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == 2
    assert relative_error(expected[:5], expected) == math.inf
    assert math.isnan(relative_error(expected.log(), expected))
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 1000]), torch.tensor([1, 1001])) == math.inf
    assert math.isnan(worst([1.0, math.nan]))
    assert worst([1.0, 2.0]) == 2


def test_launches_are_recorded_only_inside(monkeypatch):
    kernel, made = timing._read_kernel, []
    monkeypatch.setattr(type(kernel), "run", lambda _, *args, **kwargs: made.append((args, kwargs)))
    kernel.run(1, grid=(1,))
    with recorded_launches() as launches:
        kernel.run(2, grid=(1,), warmup=True)
        kernel.run(3, grid=(1,), warmup=False)
    kernel.run(4, grid=(1,))
    assert len(made) == 4
    (launch,) = launches
    launch()
    assert made[4] == made[2]
