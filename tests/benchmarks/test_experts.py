# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the expert block runs on a CPU, and gives wrong results no ratio."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import moe_ops
from benchmarks import suite
from benchmarks.cuda import experts, peers
from benchmarks.cuda.__main__ import run_part
from benchmarks.cuda.experts import (
    BOTH,
    COMPILED,
    DYNAMIC,
    EAGER,
    FORWARD,
    PASSES,
    PROFILED_STEPS,
    RECOMPUTE,
    Block,
    Comparison,
    Implementation,
)
from benchmarks.cuda.timing import OURS, Bench
from testing import oracle, tolerances
from testing.moe_block import composed_experts

TINY = suite.TINY_SUITE[0]
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}


class Bf16Bench(Bench):
    """Measures in bf16, because torch compiles grouped_mm in nothing else."""

    dtype = torch.bfloat16


def bench(kind=Bench, device="cpu"):
    return kind(torch.device(device), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


def fused_experts(*args, recompute="none", **kwargs):
    """Compute fused_experts by the ops that it fuses. Only the benchmark is tested here."""
    return composed_experts(*args, **kwargs)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(moe_ops, "fused_experts", fused_experts, raising=False)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block(bench(), TINY)


def spoiled(implementation, which):
    """Return the implementation with one result wrong: 0 is the output, then come the gradients."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    def forward(topk_ids):
        return 1.1 * implementation.forward(topk_ids).detach()

    if which == 0:
        return Implementation(forward, implementation.leaves)
    return replace(implementation, leaves=implementation.leaves, forward=functools.partial(
        _with_wrong_gradient, implementation, which - 1, Spoil
    ))  # fmt: skip


def _with_wrong_gradient(implementation, leaf, spoil, topk_ids):
    names = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")
    leaves = list(implementation.leaves)
    leaves[leaf] = spoil.apply(leaves[leaf])
    tensors = dict(zip(names, leaves, strict=True))
    return fused_experts(topk_ids=topk_ids, **tensors)


# The tests of the block and its reference.


@pytest.mark.parametrize("routing", suite.ROUTINGS)
def test_reference_is_right(block, routing):
    topk_ids = block.route(routing)
    leaves = [leaf.detach().double().requires_grad_() for leaf in block.leaves]
    hidden_states, gate_up_proj, down_proj, topk_weights = leaves
    output = oracle.fused_experts(hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights)
    expected = (output, *torch.autograd.grad(output, leaves, block.grad_output.double()))
    found = block.expected(topk_ids)
    assert len(found) == len(expected) == 5
    for got, want in zip(found, expected, strict=True):
        # The weights' gradients are rounded to fp16.
        assert tolerances.relative_error(got, want) < 1e-3


def test_floor():
    shape = suite.SUITE[0]
    here = bench()
    assert experts.flops(shape, BOTH) == 18 * 16384 * 8 * 2048 * 768
    assert experts.floor_milliseconds(here, shape, FORWARD) == pytest.approx(1.7, abs=0.05)
    assert experts.floor_milliseconds(here, shape, BOTH) == pytest.approx(5.0, abs=0.05)


# The tests of the comparison.


@pytest.mark.parametrize("with_transformers", [True, False])
def test_tiny_run(monkeypatch, with_transformers):
    if with_transformers:
        pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "HAS_TRANSFORMERS", with_transformers)
    whose = experts.grouped_mm_facts()["grouped_mm"]
    assert ("not installed" in whose) is not with_transformers
    records = list(experts.run_experts(bench(), TINY))
    json.dumps(records, allow_nan=False)
    assert [(r["routing"], r["pass"]) for r in records] == [
        (routing, name) for routing in suite.BLOCK_ROUTINGS for name in PASSES
    ]
    for record in records:
        assert "wrong" not in record, record
        assert set(record["errors"]) == {OURS, RECOMPUTE, EAGER}
        assert record["of_floor"] > 0
        assert ("of uniform" in record["ratio"]) == (record["routing"] == "zipf")
        assert ("recompute" in record["ratio"]) == (record["pass"] == BOTH)
        assert EAGER in record["ratio"]


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("who", [OURS, EAGER])
def test_wrong_result_has_no_ratio(block, who, which):
    right = experts.ours(block)
    implementations = {OURS: right, EAGER: right, who: spoiled(right, which)}
    comparison = Comparison(block, block.route("uniform"), implementations)
    for name in PASSES:
        record = comparison.measure(name, {EAGER: (EAGER, OURS)})
        if which == 0 or name == BOTH:
            assert record["wrong"] == [who]
            assert record["ratio"] == {}
            assert who not in record["milliseconds"]
            assert ("of_floor" in record) == (who != OURS)
            assert who not in record.get("mib", {})
        else:
            assert "wrong" not in record
            assert EAGER in record["ratio"]


def test_failure_is_told_and_the_others_are_measured(block):
    def fail(topk_ids):
        raise RuntimeError("no such kernel\nand more")

    implementations = {OURS: experts.ours(block), EAGER: Implementation(fail, block.leaves)}
    record = Comparison(block, block.route("uniform"), implementations).measure(
        BOTH, {EAGER: (EAGER, OURS)}
    )
    json.dumps(record, allow_nan=False)
    assert record["wrong"] == [EAGER]
    assert record["failed"] == {EAGER: "RuntimeError: no such kernel"}
    assert OURS in record["milliseconds"]
    assert record["ratio"] == {}


@pytest.mark.parametrize("with_transformers", [True, False])
def test_compiled_grouped_mm_is_right(monkeypatch, with_transformers):
    if with_transformers:
        pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "HAS_TRANSFORMERS", with_transformers)
    torch.manual_seed(0)
    block = Block(bench(Bf16Bench), TINY)
    module = experts.grouped_mm_module(block)
    torch._dynamo.reset()
    static = experts.grouped_mm(block, experts.compiled(module, False, "aot_eager"))
    comparison = Comparison(
        block, block.route("uniform"), {OURS: experts.ours(block), COMPILED: static}
    )
    assert not comparison.failed
    assert comparison.is_right(COMPILED, BOTH), comparison.errors
    for record in experts.run_dynamic(block, module, "aot_eager"):
        assert "wrong" not in record, record
        assert set(record["ratio"]) == {DYNAMIC}


def test_memory_is_counted(monkeypatch, block):
    """The allocator says that it holds 1 MiB at first, 10 after forward and 30 at most."""
    output = torch.zeros(2 * experts.MIB, dtype=torch.int8)
    allocated = iter([1, 10])
    monkeypatch.setattr(
        torch.cuda, "memory_allocated", lambda device: next(allocated) * experts.MIB
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 30 * experts.MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    grads = (torch.zeros(3 * experts.MIB, dtype=torch.int8),) * 2
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: grads)
    implementation = Implementation(lambda topk_ids: output, ())
    found = experts.memory(bench(device="cuda"), implementation, block, block.route("uniform"))
    assert found == {"kept": 7.0, "output": 2.0, "peak": 29.0, "gradients": 6.0}


# The tests of the kernels' times.


class Kernel:
    def __init__(self, name, *arg_names):
        self.__name__, self.arg_names = name, arg_names


GEMM = Kernel("gemm", "x_ptr", "N", "K", "BLOCK_K")
UP = Kernel("up", "x_ptr", "width", "K", "BLOCK_K")
DW = Kernel("dw", "g_ptr", "N", "D", "BLOCK_D")
BIAS = Kernel("bias", "g_ptr", "N")


def launches_of(shape):
    wide, narrow = shape.hidden_size, shape.intermediate_size
    sizes = [
        (UP, narrow, wide),
        (GEMM, wide, narrow),
        (GEMM, narrow, wide),
        (DW, wide, narrow),
        (DW, 2 * narrow, wide),
        (GEMM, wide, 2 * narrow),
    ]
    launches = [
        functools.partial(print, kernel, None, n, k, GATED=True, **{kernel.arg_names[-1]: 64})
        for kernel, n, k in sizes
    ]
    # It sums, and multiplies nothing.
    launches.insert(3, functools.partial(print, BIAS, None, 7, BLOCK_N=64))
    return launches


def spans_of(names, milliseconds=1.0):
    """Return PROFILED_STEPS steps of kernels, each 1 us after the last. The second is fastest."""
    spans, now = [], 0.0
    for step in range(PROFILED_STEPS):
        for name in names:
            took = milliseconds * 1e3 * (1 if step == 1 else 2)
            spans.append((now, now + took, name))
            now += took + 1
    return spans


NAMES = ("memset", "up", "gemm", "gemm", "bias", "dw", "dw", "gemm")


def test_kernels_are_told_in_order():
    shape = suite.SUITE[0]
    made = experts.kernel_records(bench(), shape, spans_of(NAMES), launches_of(shape))
    # They are printed as they come.
    records, missing = run_part([("", lambda: made)], math.inf)
    assert missing == {}
    *kernels, between = records
    assert [(r["kernel"], r["nth"]) for r in kernels][-3:] == [("dw", 1), ("dw", 2), ("gemm", 3)]
    assert [r["milliseconds"] for r in kernels] == [1.0] * len(NAMES)
    assert between["milliseconds"] == pytest.approx(7e-3)
    assert sum(r["share"] for r in records) == pytest.approx(1, abs=1e-3)
    assert [r["kernel"] for r in records if "of_floor" in r] == [
        name for name in NAMES if name in {"up", "gemm", "dw"}
    ]
    up = kernels[1]
    flops = 2 * shape.num_rows * 2 * shape.intermediate_size * shape.hidden_size
    assert up["product_tflops"] == pytest.approx(flops / 1e9, rel=1e-3)
    assert up["of_floor"] == pytest.approx(790 / up["product_tflops"], rel=1e-3)


PRODUCTS = """
from benchmarks.cuda import experts
from benchmarks.cuda.timing import Bench, recorded_launches
from benchmarks.suite import TINY_SUITE
import torch
block = experts.Block(Bench(torch.device("cpu"), tiny=True), TINY_SUITE[0])
step = experts.ours(block).call(experts.BOTH, block.route("uniform"), block.grad_output)
with recorded_launches() as launches:
    step()
names = [launch.args[0].__name__ for launch in launches]
found = experts.product_flops(TINY_SUITE[0], names, launches)
print(*(f"{name}={flops}" for name, flops in zip(names, found, strict=True)))
"""


@pytest.mark.slow
def test_products_of_our_own_kernels_are_found():
    """This breaks if a kernel calls its sizes otherwise. Then change product_flops."""
    environ = {**os.environ, "TRITON_INTERPRET": "1", "MOE_OPS_IMPLEMENTATION": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        cwd=experts.ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flops = [int(launch.partition("=")[2]) for launch in done.stdout.split()]
    assert sum(flops) == experts.flops(TINY, BOTH), done.stdout
    assert sum(count > 0 for count in flops) == 6, done.stdout


def test_products_that_do_not_add_up_have_no_floor():
    shape = suite.SUITE[0]
    missing = launches_of(shape)[1:]
    records = experts.kernel_records(bench(), shape, spans_of(NAMES), missing)
    assert not [r for r in records if "of_floor" in r]


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_steps_that_differ_are_refused(names):
    spans = spans_of(names)[:-1]
    with pytest.raises(RuntimeError, match="the profiled steps differ"):
        list(experts.kernel_records(bench(), TINY, spans, []))
    if spans:
        other = spans_of(names)
        other[-1] = (*other[-1][:2], "c")
        with pytest.raises(RuntimeError, match="the profiled steps differ"):
            list(experts.kernel_records(bench(), TINY, other, []))


def test_kernels_need_a_device():
    assert list(experts.kernels_cases(bench(), [TINY])) == []


# The tests of the other libraries.


def library(monkeypatch, name, **contents):
    for parent in [name[:i] for i, c in enumerate(name) if c == "."]:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class GLUMLP(torch.nn.Module):
    """Stands for scattermoe's module, with up rows before gate rows."""

    def __init__(self, input_size, hidden_size, num_experts, top_k, activation):
        super().__init__()
        self.experts, self.output_experts = torch.nn.Module(), torch.nn.Module()
        self.activation = activation
        for module, sizes in (
            (self.experts, (2 * hidden_size, input_size)),
            (self.output_experts, (input_size, hidden_size)),
        ):
            module.weight = torch.nn.Parameter(torch.empty(num_experts, *sizes))

    def forward(self, x, expert_p, expert_idxs):
        assert expert_idxs.dtype == torch.int64
        up, gate = self.experts.get_parameter("weight").chunk(2, 1)
        down = self.output_experts.get_parameter("weight")
        return fused_experts(x, torch.cat((gate, up), 1), down, expert_idxs.int(), expert_p)


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32
        return fused_experts(x, gate_up_proj, down_proj, top_k_index, top_k_weights)


def grouped_gemm(X, W, m_sizes, topk, gather_indices, permute_x=False, permute_y=False, **options):
    """Stand for Unsloth's function."""
    assert options.pop("autotune")
    assert options.pop("is_first_gemm") is permute_x
    assert not options
    return moe_ops.grouped_gemm(
        X, W, m_sizes, gather_indices, top_k=topk if permute_x else 1, permute_x=permute_x,
        permute_y=permute_y,
    )  # fmt: skip


def sonicmoe(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id,
    activation_type, is_inference_mode_enabled=False, concat_layout=False,
):  # fmt: skip
    """Stand for its function, which wants gate and up rows by turns if it is not told otherwise."""
    assert (b1, b2, E, activation_type) == (None, None, TINY.num_experts, "swiglu")
    assert (router_scores.dtype, token_indices.dtype) == (torch.float32, torch.int32)
    assert token_indices.tolist() == sorted(token_indices.tolist())
    assert is_inference_mode_enabled is not torch.is_grad_enabled()
    shape = (-1, TINY.top_k)
    gate_up = w1.permute(2, 0, 1)
    if not concat_layout:
        gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
    ids, weights = expert_indices.view(shape), router_scores.view(shape)
    return fused_experts(x, gate_up, w2.permute(2, 0, 1), ids, weights), None


class Tuned:
    """A product that tunes itself, beside which quack keeps the function that does not."""

    @staticmethod
    def fn(*args, config):
        return args, config


@pytest.fixture
def libraries(monkeypatch):
    library(monkeypatch, "scattermoe.mlp", GLUMLP=GLUMLP)
    library(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=LigerFusedMoEFunction)
    library(monkeypatch, "unsloth.kernels.moe.grouped_gemm.interface", grouped_gemm=grouped_gemm)
    kind = types.SimpleNamespace(SWIGLU="swiglu")
    library(monkeypatch, "sonicmoe.enums", ActivationType=kind)
    sys.modules["sonicmoe"].moe_general_routing_inputs = sonicmoe  # type: ignore[attr-defined]
    library(monkeypatch, "quack.gemm_interface", gemm_tuned=Tuned(), gemm_act_tuned=Tuned())
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_is_called_as_its_library_says(libraries, name):
    """The adapter is tried on a stand-in that has the library's documented interface."""
    records = list(peers.measure(bench(), TINY, name))
    assert [r["pass"] for r in records] == list(PASSES)
    for record in records:
        assert "wrong" not in record, record
        assert set(record["ratio"]) == {name}
        assert (record["peer"], record["shape"]) == (name, TINY.name)
        assert record["first_call_seconds"] > 0


@pytest.mark.parametrize("name", ["sonicmoe", "sonicmoe interleaved", "sonicmoe autotuned"])
def test_sonicmoe_takes_its_default_configurations(libraries, name):
    interface: Any = sys.modules["quack.gemm_interface"]
    before = interface.gemm_tuned, interface.gemm_act_tuned
    list(peers.measure(bench(), TINY, name))
    after = interface.gemm_tuned, interface.gemm_act_tuned
    if name == "sonicmoe autotuned":
        assert after == before
    else:
        assert [function(1, 2) for function in after] == [((1, 2), None)] * 2


def test_wrong_peer_has_no_ratio(libraries, monkeypatch):
    def half(*args):
        return LigerFusedMoEFunction.apply(*args) / 2

    wrong = types.SimpleNamespace(apply=half)
    monkeypatch.setattr(sys.modules["liger_kernel.ops"], "LigerFusedMoEFunction", wrong)
    for record in peers.measure(bench(), TINY, "liger"):
        assert record["wrong"] == ["liger"]
        assert record["ratio"] == {}


def test_absent_peers_are_named(monkeypatch):
    def find_spec(module):
        return object() if module == "scattermoe" else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    found = peers.facts()
    assert found["present"] == {"scattermoe": "version unknown"}
    assert found["absent"] == {
        "liger": "no module liger_kernel",
        "unsloth": "no module unsloth",
        "sonicmoe": "no module sonicmoe",
    }
    labels = [label for label, _ in peers.cases(bench(), [TINY, suite.SUITE[0]], math.inf)]
    assert labels == ["scattermoe tiny", "scattermoe qwen3-30b"]


def test_which_peers_run_on_which_shapes(libraries, monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda: {"scattermoe": "no module"})

    def labels(*names):
        return [label for label, _ in peers.cases(bench(), suite.SUITE, math.inf, names)]

    # Autotuning takes minutes, and so one shape.
    assert labels("sonicmoe autotuned", "scattermoe") == ["sonicmoe autotuned qwen3-30b"]
    assert labels("liger") == [f"liger {shape.name}" for shape in suite.SUITE]
    assert peers.jobs_ahead(bench(), suite.SUITE, math.inf, ["sonicmoe autotuned", "liger"]) == {}


def test_peers_that_compile_long_are_called_before_in_processes_of_their_own(
    monkeypatch, libraries
):
    started = []

    def run_apart(*arguments, **options):
        started.append((arguments, options))
        return iter(())

    monkeypatch.setattr(peers, "absent", lambda: {"liger": "no module"})
    monkeypatch.setattr(peers, "run_apart", run_apart)
    jobs = peers.jobs_ahead(bench(), [TINY, suite.SUITE[0]], 7.0)
    assert list(jobs) == [
        f"sonicmoe{layout} {shape}"
        for layout in ("", " interleaved")
        for shape in ("tiny", "qwen3-30b")
    ]
    jobs["sonicmoe tiny"]()
    assert started == [
        (("benchmarks.cuda.peers", bench(), TINY, "sonicmoe", 7.0), {"measures": False})
    ]
    monkeypatch.setattr(peers, "absent", lambda: dict.fromkeys(peers.LIBRARIES, "no module"))
    assert peers.jobs_ahead(bench(), [TINY], 7.0) == {}
    # What such a process does: it calls, and measures nothing.
    assert list(peers.compile_only(bench(), TINY, "sonicmoe")) == []


@pytest.mark.slow
def test_peer_that_fails_is_told(monkeypatch, tmp_path):
    (tmp_path / "scattermoe").mkdir()
    (tmp_path / "scattermoe" / "mlp.py").write_text("raise OSError('no such GPU')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(RuntimeError, match="scattermoe ended with 1: OSError: no such GPU"):
        list(peers.run_peer(bench(), TINY, "scattermoe", math.inf))
    monkeypatch.setattr(peers, "_LEAST_SECONDS", 0.01)
    with pytest.raises(TimeoutError, match="scattermoe was not done in the 0 s left"):
        list(peers.run_peer(bench(), TINY, "scattermoe", time.monotonic()))
