# SPDX-License-Identifier: Apache-2.0
"""The fused Qwen3-MoE block trains: partly frozen, compiled, cast, checkpointed and sharded."""

import functools
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

import moe_ops
from moe_ops.compat.kernels.tuning import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.compat.reference.moe_block import (
    Qwen3MoeFusedGroupedGEMMBlock,
    Qwen3MoeGroupedGEMMBlock,
)
from testing.checks import assert_close
from testing.compat_blocks import (
    BLOCKS,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    WEIGHTS,
    RecordOps,
    qwen3_block,
    tangents_of,
    tokens,
)

FUSED: dict[str, Any] = {name: flags for name, (_, flags) in BLOCKS.items() if name != "torch"}
fused = pytest.mark.parametrize("name", FUSED)
UP = (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)
DOWN = (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE)
# By option, the gradients that it leaves out.
PARTIAL = {"dW_only": ("input",), "dX_only": WEIGHTS}
CONFIGS: dict[str, Any] = {
    "kernel_config_fwd": KernelConfigForward(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    "kernel_config_bwd_dW": KernelConfigBackward_dW(BLOCK_M=32, num_warps=4),
    "kernel_config_bwd_dX": KernelConfigBackward_dX(BLOCK_M=16, num_stages=2),
}


def fused_block(hf: Any, name: str = "permute_x and permute_y", **options: Any) -> Any:
    return Qwen3MoeFusedGroupedGEMMBlock.from_hf(hf, **FUSED[name], **options)


def run(block, x, tangents, call=None) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return output and router logits, and the gradients of input and weights by name."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    outputs = (block if call is None else call)(x)
    torch.autograd.backward(outputs, tangents)
    grads = {name: getattr(block, name).grad for name in WEIGHTS}
    return list(outputs), {"input": x.grad, **grads}


def problem(num_tokens: int = 7):
    hf = qwen3_block()
    x = tokens(2, num_tokens, requires_grad=False)
    return hf, x, tangents_of(x, hf.gate(x)[0])


def assert_same(got, want, *, left_out: tuple[str, ...] = (), dtype=None) -> None:
    for actual, expected in zip(got[0], want[0], strict=True):
        assert_close(actual, expected, dtype=dtype, what="outputs")
    for name, expected in want[1].items():
        if name in left_out:
            assert got[1][name] is None, name
        else:
            assert_close(got[1][name], expected, dtype=dtype, what=f"gradient of {name}")


@fused
@pytest.mark.parametrize("option", PARTIAL)
def test_partial_gradients_equal_the_full_ones(name, option):
    hf, x, tangents = problem()
    want = run(Qwen3MoeGroupedGEMMBlock.from_hf(hf), x, tangents)
    got = run(fused_block(hf, name, **{option: True}), x, tangents)
    assert_same(got, want, left_out=PARTIAL[option])


def backward_ops(hf, x, tangents, **options) -> list[str]:
    """Return the ops of the backward, sorted by name."""
    outputs = fused_block(hf, **options)(x.detach().requires_grad_())
    with RecordOps() as recorded:
        torch.autograd.backward(outputs, tangents)
    return sorted(recorded.calls)


@pytest.mark.parametrize("name", ["permute_x and permute_y", "neither"])
def test_backward_does_only_what_is_asked_for(name):
    hf, x, tangents = problem()
    dX = ["grouped_gemm_dx down", "grouped_gemm_dx up"]
    dW = ["grouped_gemm_dw down", "grouped_gemm_dw up"]
    # These are the gradients of permute and unpermute.
    moved = ["permute", "unpermute"] if name == "neither" else []
    ops = functools.partial(backward_ops, hf, x, tangents, name=name)
    # Each mm is the router's, one for its weight and one for its input.
    assert ops() == sorted([*dX, *dW, "mm", "mm", *moved])
    # The gradient of the first weight needs the input gradient of the second GEMM.
    assert ops(dW_only=True) == sorted([dX[0], *dW, "mm", *moved[:1]])
    assert ops(dX_only=True) == sorted([*dX, "mm", *moved])


def test_frozen_weights_cost_nothing():
    hf, x, tangents = problem()
    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    assert backward_ops(hf, x, tangents) == backward_ops(hf, x, tangents, dX_only=True)


def test_rejects_both_partial_gradients():
    expected = "Qwen3MoeFusedGroupedGEMMBlock: expected dW_only or dX_only or neither, got both"
    with pytest.raises(ValueError, match=expected):
        fused_block(qwen3_block(), dW_only=True, dX_only=True)


@pytest.mark.parametrize("options", [{}, {"dW_only": True}, {"dX_only": True}], ids=str)
@pytest.mark.parametrize("name", ["permute_x and permute_y", "neither"])
def test_compiled_equals_eager(name, options):
    hf, x, tangents = problem()
    block = fused_block(hf, name, **options)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    want = run(block, x, tangents)
    left_out = tuple(name for name, grad in want[1].items() if grad is None)
    assert_same(run(block, x, tangents, compiled), want, left_out=left_out)


def test_torch_block_compiled_equals_eager():
    hf, x, tangents = problem()
    block = Qwen3MoeGroupedGEMMBlock.from_hf(hf)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(run(block, x, tangents, compiled), run(block, x, tangents))


@pytest.mark.slow
def test_inductor_equals_eager():
    hf, x, tangents = problem()
    block = fused_block(hf, autotune=False, **CONFIGS)
    compiled = torch.compile(block, fullgraph=True)
    want = run(block, x, tangents)
    got = run(block, x, tangents, compiled)
    assert all(grad.norm() > 0 for grad in got[1].values())
    assert_same(got, want)


def test_token_counts_share_compilations():
    hf = qwen3_block()
    block, counter = fused_block(hf), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for num_tokens in (2, 3, 5, 8, 13):
        x = tokens(2, num_tokens)
        assert_close(compiled(x)[0], hf(x))
    assert counter.frame_count <= 2
    for shape in ((1, 1), (2, 0)):
        x = tokens(*shape)
        assert_close(compiled(x)[0], hf(x), what=str(shape))


def test_configurations_are_in_the_compiled_graphs():
    hf, x, tangents = problem()
    graphs: dict[str, torch.fx.Graph] = {}

    def record(direction):
        def compiler(module, example_inputs):
            graphs[direction] = module.graph
            return make_boxed_func(module)

        return compiler

    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    block = fused_block(hf, autotune=False, **CONFIGS)
    run(block, x, tangents, torch.compile(block, fullgraph=True, backend=backend))
    given = moe_ops.kernel_config(
        CONFIGS["kernel_config_fwd"],
        CONFIGS["kernel_config_bwd_dX"],
        CONFIGS["kernel_config_bwd_dW"],
    )
    found = {
        direction: [
            (str(node.target), node.args[-1])
            for node in graph.nodes
            if str(node.target).startswith("moe.grouped_gemm")
        ]
        for direction, graph in graphs.items()
    }
    assert found["forward"] == [("moe.grouped_gemm.default", given)] * 2
    names = sorted(name for name, _ in found["backward"])
    assert names == ["moe.grouped_gemm_dw.default"] * 2 + ["moe.grouped_gemm_dx.default"] * 2
    assert {config for _, config in found["backward"]} == {given}


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_autocast(compiles):
    hf, x, tangents = problem(40)
    hf = hf.bfloat16().float()
    block = fused_block(hf)
    call = torch.compile(block, fullgraph=True, backend="aot_eager") if compiles else block

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    x, tangents = x.bfloat16().float(), (tangents[0], tangents[1].bfloat16())
    got = run(block, x, tangents, cast)
    with torch.autocast("cpu", torch.bfloat16), RecordOps() as recorded:
        found = block(x, return_intermediates=True)
        assert_close(found.output, hf(x), dtype=torch.bfloat16)
    assert found.first_gemm.dtype == found.second_gemm.dtype == torch.bfloat16
    assert recorded.calls.count("grouped_gemm up") == 1
    assert [output.dtype for output in got[0]] == [torch.float32, torch.bfloat16]
    want = run(block, x, (tangents[0], tangents[1].float()))
    assert_same(got, want, dtype=torch.bfloat16)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, compiles):
    hf, x, tangents = problem()
    block = fused_block(hf)
    want = run(block, x, tangents)

    def again(x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    call = (
        torch.compile(again, fullgraph=not use_reentrant, backend="aot_eager")
        if compiles
        else again
    )
    assert_same(run(block, x, tangents, call), want)


@pytest.fixture
def one_process(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("option", [None, "dW_only", "dX_only"])
def test_fully_sharded(one_process, option):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    hf, x, tangents = problem()
    options: dict[str, Any] = {} if option is None else {option: True}
    want = run(fused_block(hf, **options), x, tangents)
    block: Any = fully_shard(fused_block(hf, **options), mesh=one_process)
    assert isinstance(block.gate_up_proj, DTensor)
    outputs, grads = run(block, x, tangents)
    local = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    assert_same((outputs, local), want, left_out=PARTIAL.get(option, ()))
