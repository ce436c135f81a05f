# SPDX-License-Identifier: Apache-2.0
"""Layers, compat and LoRA compute on CUDA what they do on the CPU in fp32.

They do so eager, compiled, cast, checkpointed and captured. The blocks of compat are compared with
torch's own ops.

T tokens, H hidden size, I intermediate size, E experts, K top_k.
"""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moe_ops
from moe_ops.compat import grouped_gemm
from moe_ops.layers.lora import LoraWeights, lora_grouped_gemm
from testing import checks, layers_problem, lora_problem, oracle, reference
from testing.compat_problem import FLAGS, expected_output, forward_and_backward, problem
from testing.layers_problem import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MODULES,
    TOP_K,
    assert_alike,
    backward_step,
    leaf_of,
    make,
    make_tokens,
    on_device,
    step,
    tangents_of,
)
from testing.on_device import DEVICE, DTYPES, assert_same_bits, move

pytestmark = pytest.mark.gpu

modules = pytest.mark.parametrize("name", MODULES)
# One module of each kind, for tests in which router and activation do not matter.
some_modules = pytest.mark.parametrize(
    "name", ["compat-qwen3", "compat-llama4", "moe-glm4_moe", "lora"]
)


class Given:
    """Holds a module on the CPU in fp32, its copy on the device, tokens and tangents for both."""

    def __init__(self, name: str, dtype: torch.dtype, **options: Any) -> None:
        self.on_cpu = make(name, **options)
        self.tokens = make_tokens(self.on_cpu)
        self.tangents = tangents_of(self.tokens)
        self.module = on_device(self.on_cpu, dtype)
        self.leaf = leaf_of(self.tokens, dtype)
        # They are on the device from the start, because a copy there would synchronise.
        output_tangent, logits_tangent = (t.to(DEVICE, dtype) for t in self.tangents)
        self.device_tangents = output_tangent, logits_tangent

    def expected(self) -> layers_problem.Step:
        module = layers_problem.plain(self.on_cpu)
        return step(module, self.tokens.clone().requires_grad_(), self.tangents)

    def outputs(self) -> Any:
        """Return the module's outputs and their tangents."""
        return layers_problem.run(self.module, self.leaf, self.device_tangents)

    def run(self, call: Any = None) -> layers_problem.Step:
        return step(self.module, self.leaf, self.device_tangents, call)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_the_cpu(name, dtype):
    given = Given(name, dtype)
    with checks.poisoned_memory():
        found = given.run()
    assert_alike(found, given.expected(), dtype)
    assert found["output"].dtype == dtype


@modules
def test_autocast(name):
    """Parameters and input are fp32, products are computed in bf16, gradients are fp32."""
    given = Given(name, torch.float32)

    def cast(tokens):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return given.module(tokens)

    found = given.run(cast)
    assert_alike(found, given.expected(), torch.bfloat16)
    exact = given.run()
    assert not torch.equal(found["output"].float(), exact["output"])
    gradients = {n: g.dtype for n, g in found.items() if n.startswith("gradient")}
    assert set(gradients.values()) == {torch.float32}


@modules
def test_inductor_equals_eager(name):
    given = Given(name, torch.bfloat16)
    compiled = torch.compile(given.module, fullgraph=True)
    with checks.poisoned_memory():
        found = given.run(compiled)
    assert_alike(found, given.run())


@some_modules
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(name, use_reentrant, compiles):
    given = Given(name, torch.bfloat16)

    def again(tokens):
        return checkpoint(given.module, tokens, use_reentrant=use_reentrant)

    call = torch.compile(again, fullgraph=not use_reentrant, backend="aot_eager")
    found = backward_step(
        given.module, given.leaf, given.device_tangents, call if compiles else again
    )
    assert_alike(found, given.run())


def without_side_stream(name: str) -> dict[str, Any]:
    return {"overlap_router_shared": False} if name == "compat-llama4" else {}


@some_modules
def test_graph_of_a_training_step_equals_eager(name):
    """One graph has forward and backward. It is replayed on other tokens, with another routing."""
    given = Given(name, torch.bfloat16, **without_side_stream(name))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            given.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = given.run()
    for other in range(3):
        generator = torch.Generator(DEVICE).manual_seed(other)
        with torch.no_grad():
            given.leaf.normal_(generator=generator)
        graph.replay()
        found = {what: tensor.clone() for what, tensor in captured.items()}
        for what, expected in given.run().items():
            assert_same_bits(found[what], expected, what)


@modules
def test_training_never_synchronizes(name):
    given = Given(name, torch.bfloat16)
    given.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The first of them is recorded, or the second if this is a process's first call of an op.
        for _ in range(3):
            given.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("option", ["dX_only", "dW_only"])
@pytest.mark.parametrize("name", ["compat-qwen3", "compat-llama4"])
def test_partial_gradients_equal_the_full_ones(name, option):
    given = Given(name, torch.float32)
    full = given.expected()
    setattr(given.module, option, True)
    torch.autograd.backward(*given.outputs())
    found = {f"gradient of {n}": p.grad for n, p in given.module.named_parameters()}
    found["gradient of the input"] = given.leaf.grad
    left_out = {n for n in found if (n == "gradient of the input") is (option == "dW_only")}
    assert {n for n, gradient in found.items() if gradient is None} == left_out
    for what in found.keys() - left_out:
        checks.assert_close(found[what].cpu(), full[what], what=what)


KERNEL_CONFIGS: dict[str, Any] = {
    "kernel_config_fwd": moe_ops.KernelConfigForward(BLOCK_M=64, BLOCK_N=32, num_warps=4),
    "kernel_config_bwd_dX": moe_ops.KernelConfigBackward_dX(BLOCK_M=32, BLOCK_K=64, num_warps=4),
    "kernel_config_bwd_dW": moe_ops.KernelConfigBackward_dW(BLOCK_M=16, BLOCK_N=64, num_warps=4),
}


@pytest.mark.parametrize("name", ["compat-qwen3", "compat-llama4"])
def test_configurations_reach_the_kernels(name):
    """The three passes have tiles of different rows, in both GEMMs of the block."""
    from benchmarks.cuda.timing import recorded_launches

    given = Given(name, torch.float32, autotune=False, **KERNEL_CONFIGS)
    with recorded_launches() as launches:
        found = given.run()
    rows: dict[str, list[int]] = {}
    made: list[Any] = list(launches)
    for launch in made:
        kernel = launch.args[0].__name__
        if kernel in {"grouped_gemm_kernel", "grouped_gemm_bwd_dw_kernel"}:
            rows.setdefault(kernel, []).append(launch.keywords["BLOCK_M"])
    assert rows == {
        "grouped_gemm_kernel": [64, 64, 32, 32],
        "grouped_gemm_bwd_dw_kernel": [16, 16],
    }
    assert_alike(found, given.expected(), torch.float32)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_side_stream_of_llama4(checkpointed):
    # The products take so long that a stream that does not wait is found out.
    sizes = {"intermediate_size": 2048, "num_local_experts": 4, "num_experts_per_tok": 2}
    block, alone = (
        layers_problem.llama4_block(1024, sizes, overlap_router_shared=overlaps).to(DEVICE)
        for overlaps in (True, False)
    )
    alone.copy_weights(block)
    for _ in range(5):
        x = torch.randn(4096, 1024, device=DEVICE)
        tangents = torch.randn(4096, 1024, device=DEVICE), torch.randn(4096, 4, device=DEVICE)
        results = []
        for module in (block, alone):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            # When the backward has read it, its memory goes back to the caching allocator.
            hidden = leaf * 1.0
            outputs = (
                checkpoint(module, hidden, use_reentrant=False) if checkpointed else module(hidden)
            )
            del hidden
            torch.autograd.backward(outputs, tangents)
            results.append([*outputs, leaf.grad, *(p.grad for p in module.parameters())])
        for actual, expected in zip(*results, strict=True):
            checks.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("permute_x", "permute_y", "weighted"), FLAGS)
def test_grouped_gemm_of_compat(permute_x, permute_y, weighted, dtype):
    """It equals the reference in fp64. Every other case has W in two dimensions."""
    sizes = {"num_tokens": 300, "in_features": 96, "out_features": 200}
    call = problem(permute_x, dtype, **sizes).call(permute_x, permute_y, weighted)
    if weighted:
        call["W"] = call["W"].flatten(0, 1)
    tangent = torch.randn(900, 200).to(dtype)
    expected = forward_and_backward(expected_output, call, tangent, torch.float64)
    on_gpu = {n: move(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    with checks.poisoned_memory():
        found = forward_and_backward(grouped_gemm, on_gpu, tangent.to(DEVICE))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        limit = checks.coarser(value.dtype, dtype)
        checks.assert_close(value.cpu(), expected[name], dtype=limit, what=name)


def as_packed_by_peft(lora_a, lora_b):
    """View lora_A as (E * r, in), experts slowest, and lora_B as (out, r * E), experts fastest."""
    num_experts, rank, _ = lora_a.shape
    packed_a = lora_a.detach().flatten(0, 1).to(DEVICE)
    packed_b = lora_b.detach().permute(1, 2, 0).flatten(1, 2).to(DEVICE)
    by_expert = packed_b.unflatten(1, (rank, num_experts)).permute(2, 0, 1)
    return packed_a.unflatten(0, (num_experts, rank)), by_expert


@pytest.mark.parametrize("rank", [3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["plain", "permute_x", "permute_y"])
def test_lora_with_the_packing_of_peft(mode, dtype, rank):
    """Rows, and gradients of router weights and factors, equal the merged weight's in fp64."""
    ids = oracle.random_topk_ids("dropped", 200, EXPERTS, TOP_K, torch.Generator().manual_seed(3))
    counts, gather, _ = oracle.routing_indices(ids, EXPERTS)
    num_rows = 200 if mode == "permute_x" else 200 * TOP_K
    x, weights = torch.randn(num_rows, HIDDEN).to(dtype), torch.rand(200, TOP_K)
    weight = (torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * HIDDEN**-0.5).to(dtype)
    adapter = lora_problem.make_adapter(EXPERTS, INTERMEDIATE, HIDDEN, rank, dtype, scaling=0.5)
    flags: dict[str, Any] = {} if mode == "plain" else {mode: True}
    tangent = torch.randn(200 * TOP_K, INTERMEDIATE).to(dtype)

    exact = [t.detach().double().requires_grad_() for t in (x, weights, *adapter[:2])]
    merged = reference.merged(weight, [LoraWeights(exact[2], exact[3], adapter.scaling)])
    expected = oracle.grouped_gemm(exact[0], merged, counts, gather, exact[1], None, TOP_K, **flags)
    wanted = [expected, *torch.autograd.grad(expected, exact, tangent.double())]

    leaves = [t.detach().to(DEVICE).requires_grad_() for t in (x, weights)]
    leaves += [t.requires_grad_() for t in as_packed_by_peft(*adapter[:2])]
    assert leaves[3].stride(0) == 1
    packed = LoraWeights(leaves[2], leaves[3], adapter.scaling)
    routing = (counts.to(DEVICE), [packed], gather.to(DEVICE), leaves[1], None, TOP_K)
    output = lora_grouped_gemm(leaves[0], weight.to(DEVICE), *routing, **flags)
    found = [output, *torch.autograd.grad(output, leaves, tangent.to(DEVICE))]
    for name, got, want in zip(("output", "x", "weights", "A", "B"), found, wanted, strict=True):
        checks.assert_close(got.cpu(), want, dtype=dtype, what=name)
