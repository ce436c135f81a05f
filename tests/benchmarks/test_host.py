# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the host's time: its flow on a CPU, and what it does with wrong results."""

import json
import math
import time
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import host
from benchmarks.cuda.experts import BOTH, COMPILED, EAGER, FORWARD, PASSES
from benchmarks.cuda.lora import OURS_COMPILED
from benchmarks.cuda.timing import OURS, TORCH, Bench
from moe_ops._triton.direct import DirectLaunch, TensorMap

TINY = suite.TINY_SUITE[0]
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}


class Bf16Bench(Bench):
    """torch compiles grouped_mm in bf16 alone."""

    dtype = torch.bfloat16


def bench(kind=Bench, device="cpu", tiny=True):
    return kind(torch.device(device), tiny=tiny, seconds=0.0, least_turns=2, ceilings=CEILINGS)


def test_the_host_is_timed_in_whole_rounds_after_a_synchronisation(monkeypatch):
    made = []
    monkeypatch.setattr(Bench, "synchronize", lambda self: made.append("synchronize"))
    calls = {name: lambda name=name: made.append(name) for name in ("a", "b", "c")}
    times = host.host_microseconds(bench(tiny=False), calls, turns=7)
    # Six orders of three calls: twelve turns.
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 12)
    assert all(us >= 0 for each in times.values() for us in each)
    timed = made[len(calls) * host.WARM_UPS :]
    assert timed[0::2] == ["synchronize"] * 36
    assert sorted(timed[1::2]) == ["a"] * 12 + ["b"] * 12 + ["c"] * 12


def test_ratios_are_ours_over_theirs_turn_by_turn(monkeypatch):
    times = {OURS: [2.0, 6.0], EAGER: [4.0, 4.0], COMPILED: [1.0, 2.0], OURS_COMPILED: [0.5, 0.5]}
    monkeypatch.setattr(host, "host_microseconds", lambda bench, calls: times)
    record = host.host_record(bench(), {})
    assert record["host_ratio"] == {
        "of eager": [0.75, 1.0, 1.25],
        "of compiled": [2.25, 2.5, 2.75],
        "compiled of compiled": [0.3125, 0.375, 0.4375],
    }
    assert record["host_us"][OURS] == [3.0, 4.0, 5.0]


def test_a_step_is_one_of_many_between_two_synchronisations(monkeypatch):
    made = []
    monkeypatch.setattr(Bench, "synchronize", lambda self: made.append("|"))
    calls = {name: lambda name=name: made.append(name) for name in (OURS, COMPILED)}
    record = host.step_record(bench(tiny=False), calls)
    told = " ".join(made).removesuffix(" |").split(" | ")
    runs = [part for part in told if part.count(" ") == host.STEPS - 1]
    assert len(runs) == 2 * host.STEP_TURNS
    assert all(len(set(run.split())) == 1 for run in runs)
    assert set(record["step_us"]) == {OURS, COMPILED}
    assert set(record["step_ratio"]) == {COMPILED}


def test_a_steps_ratio_is_theirs_over_ours(monkeypatch):
    clock = iter([0, 2000 * host.STEPS, 0, 6000 * host.STEPS] * host.STEP_TURNS)
    monkeypatch.setattr(host, "orders", lambda count: [[0, 1]])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    record = host.step_record(bench(tiny=False), {OURS: lambda: None, EAGER: lambda: None})
    assert record == {
        "step_us": {OURS: [2.0] * 3, EAGER: [6.0] * 3},
        "step_ratio": {EAGER: [3.0] * 3},
    }


@pytest.mark.parametrize("what", host.MAKERS)
def test_blocks_without_a_compiler(what):
    records = list(host.run_blocks(bench(), what, TINY))
    json.dumps(records, allow_nan=False)
    assert [record["pass"] for record in records] == list(PASSES)
    for record in records:
        assert "wrong" not in record, record
        assert record["what"] == what
        assert set(record["host_us"]) == set(record["milliseconds"]) == {OURS, EAGER}
        assert set(record["host_ratio"]) == {"of eager"}
        assert set(record["ratio"]) == set(record["step_ratio"]) == {EAGER}


@pytest.mark.parametrize("what", host.MAKERS)
def test_compiled_blocks_are_right(what):
    torch.manual_seed(0)
    for record in host.run_blocks(bench(Bf16Bench), what, TINY, "aot_eager"):
        assert "wrong" not in record, record
        assert set(record["host_us"]) == {OURS, EAGER, COMPILED, OURS_COMPILED}
        assert set(record["host_ratio"]) == {"of eager", "of compiled", "compiled of compiled"}
        assert set(record["ratio"]) == {EAGER, COMPILED, "both compiled"}
        assert set(record["step_ratio"]) == {EAGER, COMPILED, "both compiled"}


def test_grouped_gemm_beside_torchs():
    records = list(host.run_gemm(bench(), TINY))
    assert [record["pass"] for record in records] == [FORWARD, BOTH]
    for record in records:
        assert "wrong" not in record, record
        assert set(record["errors"]) == {OURS, TORCH}
        assert set(record["host_ratio"]) == {"of torch"}


def test_every_op_is_right():
    torch.manual_seed(0)
    records = list(host.run_ops(bench(), TINY))
    json.dumps(records, allow_nan=False)
    assert {record["op"] for record in records} >= {
        "routing_indices", "grouped_gemm", "grouped_gemm_dx", "grouped_gemm_dw", "fused_experts",
        "fused_experts_forward", "fused_experts_down_backward", "fused_experts_up_backward",
        "permute", "unpermute",
    }  # fmt: skip
    for record in records:
        assert "wrong" not in record, record
        assert set(record["host_us"]) == {OURS}
        assert "launches" not in record


@pytest.mark.parametrize("error", [0.1, math.nan, math.inf])
def test_what_is_wrong_is_not_timed(error):
    calls = {OURS: lambda: None, TORCH: lambda: None}
    record = host.op_record(bench(), calls, {OURS: error, TORCH: 0.0})
    json.dumps(record, allow_nan=False)
    assert record["wrong"] == [OURS]
    assert set(record["host_us"]) == {TORCH}
    assert record["host_ratio"] == {}


# The gradient of z, output 0 of the first op, shows in the results of the second.
GRADIENTS = [
    ("down", 0, "up"), ("down", 1, "down"), ("down", 2, "down"), ("up", 0, "up"), ("up", 1, "up"),
]  # fmt: skip


@pytest.mark.parametrize(("projection", "which", "wrong"), GRADIENTS)
def test_a_wrong_gradient_of_the_op_is_found(monkeypatch, projection, which, wrong):
    torch.manual_seed(0)
    op = f"fused_experts_{projection}_backward"
    original = getattr(torch.ops.moe, op).default

    def spoiled(*args):
        return tuple(
            result * 1.1 if i == which else result for i, result in enumerate(original(*args))
        )

    names = (
        "routing_indices", "grouped_gemm", "grouped_gemm_dx", "grouped_gemm_dw", "fused_experts",
        "fused_experts_forward", "fused_experts_down_backward", "fused_experts_up_backward",
        "permute", "unpermute",
    )  # fmt: skip
    ops = {name: getattr(torch.ops.moe, name) for name in names}
    ops[op] = types.SimpleNamespace(default=spoiled)
    monkeypatch.setattr(host, "moe", types.SimpleNamespace(**ops))
    records = {record["op"]: record for record in host.run_ops(bench(), TINY)}
    assert [name for name, record in records.items() if "wrong" in record] == [
        f"fused_experts_{wrong}_backward"
    ]


def test_launches_and_allocations_are_counted_per_call(monkeypatch):
    """Against a profiler that saw seven events a call, three of them of the device."""
    made: list[None] = []

    class Profile:
        def __enter__(self):
            made.clear()
            return self

        def __exit__(self, *error):
            return None

        def events(self):
            kinds = ["CUDA"] * 3 + ["CPU"] * 4
            return [
                types.SimpleNamespace(device_type=types.SimpleNamespace(name=kind))
                for _ in made
                for kind in kinds
            ]

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    monkeypatch.setattr(Bench, "synchronize", lambda self: None)
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {"allocation.all.allocated": 5 * len(made)}
    )
    found = host.counted(bench(device="cuda"), lambda: made.append(None))
    assert found == {"launches": 3.0, "allocations": 5.0}


def launch_that_tells(made: list[str]) -> DirectLaunch:
    """A launch of a kernel with one descriptor, which notes that it was made."""

    def tell() -> int:
        made.append("launch")
        return 0

    descriptor: Any = TensorMap.__new__(TensorMap)
    vars(descriptor).update(_kept={8: bytes(128)})
    launch: Any = DirectLaunch.__new__(DirectLaunch)
    vars(launch).update(
        _is_empty=False, _words=[], _pointers=[], _bytes=bytearray(128), _stream=0, _arguments=(),
        _maps=[(0, 0, 0, descriptor)], _launch=tell,
    )  # fmt: skip
    return launch


def test_an_op_is_taken_apart(monkeypatch):
    """Its descriptors are counted, and nothing is launched while the rest of it is timed."""
    made: list[str] = []
    monkeypatch.setattr(Bench, "synchronize", lambda self: None)
    monkeypatch.setattr(host, "counted", lambda bench, call: {"launches": 1.0})
    launch = launch_that_tells(made)

    def call():
        made.append("call")
        launch([8], 0)

    assert host.taken_apart(bench(device="cuda"), call) == {"launches": 1.0, "descriptors": 1}
    assert made == ["call", "launch"]
    made.clear()
    found = host.time_without_launches(bench(device="cuda"), call)
    assert found.keys() == {"us_without_launches"}
    assert found["us_without_launches"] > 0
    assert len(made) > 2 * host.WARM_UPS
    assert set(made) == {"call"}
    assert host.taken_apart(bench(), call) == host.time_without_launches(bench(), call) == {}
    launch([8], 0)
    assert made[-1] == "launch"


def test_cases_time_before_they_count():
    labels = [label for label, _ in host.cases(bench(), [])]
    assert labels == ["experts tiny", "lora tiny", "grouped_gemm", "ops", "launches"]
    assert list(host.run_counts(bench(), TINY)) == []
    assert list(host.jobs_ahead(bench(), [])) == ["host experts tiny", "host lora tiny"]
