# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of LoRA and of blocks have right references, and give wrong results no ratio."""

import json
import math
import os
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import blocks, experts, lora, peers
from benchmarks.cuda.experts import BOTH, COMPILED, EAGER, FORWARD, PASSES, Comparison
from benchmarks.cuda.lora import CHECKPOINT, LAYOUTS, LoraBlock
from benchmarks.cuda.timing import OURS, Bench
from testing import oracle, tolerances

TINY = suite.TINY_SUITE[0]
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.4}


class Bf16Bench(Bench):
    """Measures in bf16, because torch compiles grouped_mm in nothing else."""

    dtype = torch.bfloat16


def bench(kind=Bench):
    return kind(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def assert_expected(found, output, leaves, grad_output):
    """Check that a block's loop gives what autograd gives for the output in fp64."""
    wanted = (output, *torch.autograd.grad(output, leaves, grad_output.double()))
    for got, want in zip(found, wanted, strict=True):
        # The weights' gradients may be rounded to fp16.
        assert want.norm() > 0
        assert tolerances.relative_error(got, want) < 1e-3


# The tests of LoRA.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", suite.ROUTINGS)
def test_lora_reference_is_right(layout, routing):
    """It equals a product with the merged weight of each slot."""
    block = LoraBlock(bench(), TINY, layout)
    topk_ids = block.route(routing)
    leaves = [leaf.detach().double().requires_grad_() for leaf in block.leaves]
    x, weights, *factors = leaves
    up_a, up_b, down_a, down_b = block.by_expert(factors)
    gate_up = block.gate_up_proj.double() + lora.SCALING * up_b @ up_a
    down = block.down_proj.double() + lora.SCALING * down_b @ down_a
    output = oracle.fused_experts(x, gate_up, down, topk_ids, weights)
    assert_expected(block.expected(topk_ids), output, leaves, block.grad_output)


def test_layouts_hold_the_same_adapters():
    """PEFT packs lora_A with the experts slowest, and lora_B with the experts fastest."""
    stacked = LoraBlock(bench(), TINY, LAYOUTS[0])
    torch.manual_seed(0)
    packed = LoraBlock(bench(), TINY, "PEFT")
    E, r, (N, D) = TINY.num_experts, lora.RANK, TINY.features("up")
    assert [tuple(f.shape) for f in packed.factors[:2]] == [(E * r, D), (N, r * E)]
    for one, other in zip(packed.by_expert(packed.factors), stacked.factors, strict=True):
        assert torch.equal(one, other)
    (up_b,) = packed.by_expert(packed.factors)[1:2]
    assert up_b.stride(0) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_compiled_and_checkpointed(layout):
    records = list(lora.run_lora(bench(Bf16Bench), TINY, layout, "aot_eager"))
    json.dumps(records, allow_nan=False)
    assert [(r["layout"], r["pass"]) for r in records] == [(layout, name) for name in PASSES]
    for record in records:
        assert "wrong" not in record, record
        assert {EAGER, COMPILED, "both compiled"} <= set(record["ratio"])
        is_checked = layout != "PEFT" and record["pass"] == BOTH
        assert ({CHECKPOINT, f"{CHECKPOINT}, compiled"} <= set(record["ratio"])) == is_checked


def test_lora_flops_are_those_of_the_products():
    """They are counted: the adapters have weight gradients, and the base has none."""
    from torch.utils.flop_counter import FlopCounterMode

    block = LoraBlock(bench(), TINY, LAYOUTS[0])
    # The module is not called, because the counter's hooks on modules break torch.autograd.grad.
    implementation = lora.implementation(block, lora.OurLora(block).forward, copied=False)
    topk_ids = block.route("uniform")
    for name in PASSES:
        with FlopCounterMode(display=False) as counter:
            implementation.call(name, topk_ids, block.grad_output)()
        assert counter.get_total_flops() == block.flops(name)


@pytest.mark.parametrize("which", range(7))
def test_wrong_lora_has_no_ratio(which):
    """The output is wrong, or the gradient of any leaf."""
    block = LoraBlock(bench(), TINY, LAYOUTS[0])
    found = lora.implementations_of(block, None)
    right = found[OURS]

    class Wrong(type(right)):  # type: ignore[misc]
        def call(self, name, topk_ids, grad_output):
            call = super().call(name, topk_ids, grad_output)

            def spoiled():
                results = call()
                if name == FORWARD:
                    return results * 1.1 if which == 0 else results
                return tuple(r * 1.1 if i == which else r for i, r in enumerate(results))

            return spoiled

    found[OURS] = Wrong(right.forward, right.leaves)
    record = Comparison(block, block.route("uniform"), found).measure(BOTH, {EAGER: (EAGER, OURS)})
    assert record["wrong"] == [OURS]
    assert record["ratio"] == {}


@pytest.mark.parametrize("part", ["lora", blocks.COMPAT])
def test_compiled_ahead_is_what_is_measured(monkeypatch, part):
    """Every implementation is compiled ahead, and the comparison compiles none again."""
    counter: Any = CompileCounterWithBackend("aot_eager")
    here = bench(Bf16Bench)
    if part == "lora":
        lora.compile_lora(here, TINY, LAYOUTS[0], counter)
    else:
        blocks.compile_blocks(here, TINY, counter)
    ahead = counter.frame_count
    torch._dynamo.reset()
    counter.clear()
    run = lora.run_lora(here, TINY, LAYOUTS[0], counter) if part == "lora" else None
    assert list(run or blocks.run_blocks(here, TINY, counter))
    assert counter.frame_count == ahead > 0


def test_jobs_are_of_what_is_measured():
    here = Bench(torch.device("cpu"))
    assert list(lora.jobs_ahead(here, suite.SUITE)) == [
        f"lora {name} {layout}" for name in suite.LORA for layout in LAYOUTS
    ]
    assert list(blocks.jobs_ahead(here, suite.SUITE)) == [f"block {name}" for name in suite.BLOCKS]


def do_nothing():
    pass


def fail():
    raise RuntimeError("no such device\nand more")


def test_a_job_that_fails_is_told(capfd):
    experts.compile_ahead({"good": do_nothing, "bad": fail}, 2)
    assert capfd.readouterr().out == "compiling bad ahead: RuntimeError: no such device\n"


# The tests of blocks.


def test_block_reference_is_right():
    block = blocks.RoutedBlock(bench(), TINY)
    leaves = [leaf.detach().double().requires_grad_() for leaf in block.leaves]
    x, gate_up_proj, down_proj, gate = leaves
    probabilities = torch.softmax(x @ gate.t(), -1)
    weights, ids = probabilities.topk(TINY.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    output = oracle.fused_experts(x, gate_up_proj, down_proj, ids, weights)
    assert_expected(block.expected(block.topk_ids), output, leaves, block.grad_output)


def test_tokens_are_decided():
    """No tokens are near a tie at the last choice, as many in bf16 would be."""
    shape = suite.Shape("many", 500, 64, 16, 64, 4)
    block = blocks.RoutedBlock(bench(Bf16Bench), shape)
    logits = F.linear(block.hidden_states, block.gate).float().topk(5).values
    assert (logits[:, 3] - logits[:, 4] > 2**-6 * logits[:, 3].abs()).all()


@pytest.mark.parametrize("with_transformers", [True, False])
def test_blocks(monkeypatch, with_transformers):
    if with_transformers:
        pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "HAS_TRANSFORMERS", with_transformers)
    records = list(blocks.run_blocks(bench(Bf16Bench), TINY, "aot_eager"))
    json.dumps(records, allow_nan=False)
    assert [r["pass"] for r in records] == list(PASSES)
    loops = {blocks.LOOP, f"compat: {blocks.LOOP}"}
    wanted = set(blocks.RATIOS) - (set() if with_transformers else loops)
    for record in records:
        assert "wrong" not in record, record
        assert set(record["ratio"]) == wanted
        assert record["of_floor"] > 0
    assert (blocks.LOOP in blocks.facts()["absent"]) is (not with_transformers)


UNSLOTH_BLOCK = """
from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock as Ours

class Qwen3MoeFusedGroupedGEMMBlock(Ours):
    def forward(self, hidden_states):
        output, router_logits = super().forward(hidden_states)
        return output * {factor}, router_logits
"""


@pytest.fixture
def unsloth(monkeypatch, tmp_path):
    """Install a stand-in that has the library's documented interface."""
    pytest.importorskip("transformers")

    def install(factor):
        folder = tmp_path / "unsloth" / "kernels" / "moe" / "grouped_gemm" / "reference"
        folder.mkdir(parents=True)
        (tmp_path / "unsloth" / "__init__.py").touch()
        for package in (folder.parent, folder):
            (package / "__init__.py").touch()
        (folder / "moe_block.py").write_text(UNSLOTH_BLOCK.format(factor=factor))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    before = list(sys.path)
    yield install
    sys.path[:] = before
    for name in [name for name in sys.modules if name.split(".")[0] in {"grouped_gemm", "unsloth"}]:
        del sys.modules[name]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_unsloth_is_called_as_its_page_says(unsloth, factor):
    unsloth(factor)
    for record in blocks.measure(bench(), TINY, blocks.UNSLOTH):
        assert record["peer"] == blocks.UNSLOTH
        assert record.get("wrong", []) == ([] if factor == 1 else [blocks.UNSLOTH])
        assert set(record["ratio"]) == (
            {blocks.UNSLOTH, f"compat: {blocks.UNSLOTH}"} if factor == 1 else set()
        )


@pytest.mark.slow
def test_unsloth_has_a_process_of_its_own(unsloth):
    unsloth(1.0)
    labels = dict(blocks.cases(bench(), [TINY], math.inf))
    assert list(labels) == [TINY.name, f"{blocks.UNSLOTH} {TINY.name}"]
    records = list(labels[f"{blocks.UNSLOTH} {TINY.name}"]())
    assert [record["pass"] for record in records] == list(PASSES)
    assert all("wrong" not in record for record in records)


def test_unsloth_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setattr(peers, "absent", lambda: {blocks.UNSLOTH: "no module unsloth"})
    assert blocks.facts()["absent"][blocks.UNSLOTH] == "no module unsloth"
    assert [label for label, _ in blocks.cases(bench(), [TINY], math.inf)] == [TINY.name]
