# SPDX-License-Identifier: Apache-2.0
"""fused_experts and its gradients are right at ragged and even sizes of several tiles.

T tokens, K top_k, R = T * K rows, E experts, H hidden size, I intermediate size.
"""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from testing import device_memory, reference
from testing.checks import assert_rows_close
from testing.experts_problem import MODES, check, problem
from testing.model_sizes import MODELS, Model
from testing.moe_block import composed_experts
from testing.on_device import DEVICE, DTYPES, memory_slot
from testing.tolerances import RELATIVE_NORM

pytestmark = pytest.mark.gpu

moe = torch.ops.moe

# T, K, E, H, I: many rows an expert, then few. Blocks divide some widths. Descriptors can read some
# that no block divides, and cannot read the odd ones.
SHAPES = {
    "even": (1000, 2, 4, 256, 512),
    "gptoss": (700, 4, 8, 96, 360),
    "odd": (801, 2, 5, 257, 129),
    "one-expert": (300, 1, 1, 136, 200),
    "decode": (6, 4, 32, 512, 256),
    "decode-odd": (3, 2, 8, 131, 67),
    "narrow": (700, 2, 4, 3, 5),
}
ROUTINGS = ("uniform", "dropped", "hot_and_empty", "zipf")
CASES = [
    pytest.param(shape, mode, dtype, i, id=f"{shape}-{mode}-{str(dtype).removeprefix('torch.')}")
    for i, (shape, mode, dtype) in enumerate(
        (shape, mode, dtype) for shape in SHAPES for mode in MODES for dtype in DTYPES
    )
]


@pytest.mark.parametrize(("shape", "mode", "dtype", "seed"), CASES)
def test_sizes_and_flags(shape, mode, dtype, seed):
    check(
        problem(
            SHAPES[shape],
            dtype,
            # There are 7 x 9 x 3 cases. Strides that share no factor with these meet every pair.
            routing=ROUTINGS[seed // 5 % 4],
            layout=("contiguous", "transposed", "padded", "expert-last")[seed // 11 % 4],
            index_dtype=(torch.int32, torch.int64)[seed // 2 % 2],
            **MODES[mode],
        )
    )


@pytest.mark.parametrize("routing", reference.ROUTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["even", "decode"])
def test_routings(shape, mode, routing):
    check(problem(SHAPES[shape], torch.bfloat16, routing=routing, **MODES[mode]))


# Rows of every operand begin within sectors of 32 bytes; TMA cannot describe any operand.
@pytest.mark.parametrize("widths", [(1000, 344), (1001, 345)], ids=["sectors", "odd"])
@pytest.mark.parametrize("mode", ["swiglu", "gpt-oss"])
def test_widths_of_many_rows(widths, mode):
    check(problem((1501, 3, 6, *widths), torch.bfloat16, routing="zipf", **MODES[mode]))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("mode", ["swiglu", "gpt-oss", "ungated"])
def test_weight_gradients_have_the_strides_of_the_weights(mode, layout):
    given = problem(SHAPES["even"], torch.bfloat16, layout=layout, **MODES[mode])
    _, gradients = given.run()
    for name in ("gate_up_proj", "down_proj"):
        assert gradients[name].stride() == given.arguments[name].stride()


def arguments_of(model: Model) -> list[Tensor]:
    tokens, hidden, width, experts, top_k, _ = model

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(scale)

    return [
        randn(tokens, hidden),
        randn(experts, 2 * width, hidden, scale=hidden**-0.5),
        randn(experts, hidden, width, scale=width**-0.5),
        reference.route("uniform", tokens, experts, top_k, DEVICE),
        torch.rand(tokens, top_k, device=DEVICE) + 0.1,
    ]


def gradients_of(function: Any, given: list[Tensor], tangent: Tensor) -> list[Tensor]:
    leaves = [g.detach().requires_grad_(g.is_floating_point()) for g in given]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, [*leaves[:3], leaves[4]], tangent)]


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """At models' sizes it equals the separate ops, which test_models.py compares with fp64."""
    with memory_slot(all_of_them=True):
        given = arguments_of(MODELS[name])
        tangent = torch.randn_like(given[0])
        got = gradients_of(moe.fused_experts, given, tangent)
        want = gradients_of(composed_experts, given, tangent)
        # Each is off by up to the tolerance.
        limit = 2 * RELATIVE_NORM[torch.bfloat16]
        for position, (one, two) in enumerate(zip(got, want, strict=True)):
            # The temporaries of all rows at once would not fit beside other tests' memory.
            rows = max(1, len(one) // 32)
            pairs = list(zip(one.split(rows), two.split(rows), strict=True))
            assert all(torch.isfinite(a).all() for a, _ in pairs)
            squares = [((a.float() - b).square().sum(), b.float().square().sum()) for a, b in pairs]
            error, size = torch.tensor(squares, dtype=torch.float64).sum(0).sqrt()
            assert error < limit * size, f"output or gradient {position}: {error / size:.1e}"


SAVED = {"swiglu": 1, "swiglu-recompute": 0}


@pytest.mark.parametrize("mode", SAVED)
def test_memory_kept_for_the_backward(mode):
    """Beside the output it is the pre-activation or nothing, and at most 12 bytes a slot."""
    given = problem((2000, 4, 8, 512, 256), torch.bfloat16, **MODES[mode])
    arguments = given.arguments
    leaves = {n: arguments[n].requires_grad_() for n in given.differentiable}
    moe.fused_experts(**{**arguments, **leaves})
    torch.cuda.synchronize()
    before = device_memory.held()
    output = moe.fused_experts(**{**arguments, **leaves})
    kept = device_memory.held() - before - output.nbytes
    num_rows = arguments["topk_ids"].numel()
    pre_activation = num_rows * 2 * 256 * 2 * SAVED[mode]
    assert pre_activation <= kept <= pre_activation + 12 * num_rows + 4096


def test_the_backward_peaks_lower_by_the_pre_activation():
    """A retained graph keeps it. Otherwise it is freed before the largest gradient is allocated."""
    # The gradient of gate_up_proj, 64 MiB, is larger than z and all that stands beside z.
    given = problem((512, 2, 8, 2048, 1024), torch.bfloat16, routing="uniform")
    leaves = {n: given.arguments[n].requires_grad_() for n in given.differentiable}

    def peak(retain_graph: bool) -> int:
        output = moe.fused_experts(**{**given.arguments, **leaves})
        # Else what a first call left in cycles of references might be freed in between.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = device_memory.held()
        torch.autograd.grad(
            output, list(leaves.values()), given.grad_output, retain_graph=retain_graph
        )
        torch.cuda.synchronize()
        return device_memory.most_held() - before

    pre_activation = 1024 * 2048 * 2
    # Called by Triton, recorded, and replayed.
    for _ in range(4):
        freed = peak(True) - peak(False)
        assert abs(freed - pre_activation) < 2**18


def kernels_of(given: Any, names: list[str]) -> list[str]:
    """Return the kernels that the backward launches for the gradients of `names` alone."""
    leaves = {n: given.arguments[n].detach().requires_grad_() for n in names}
    output = moe.fused_experts(**{**given.arguments, **leaves})
    torch.autograd.grad(output, list(leaves.values()), given.grad_output)
    output = moe.fused_experts(**{**given.arguments, **leaves})
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(output, list(leaves.values()), given.grad_output)
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


# A product runs in the kernel for every GPU or in one for Hopper. One of these does two things.
DW = (
    "grouped_gemm_bwd_dw_kernel", "grouped_gemm_bwd_dw_cooperative_kernel",
    "grouped_gemm_bwd_dw_pingpong_kernel",
)  # fmt: skip
GEMM = (
    "grouped_gemm_kernel", "grouped_gemm_cooperative_kernel", "grouped_gemm_pingpong_kernel",
    "grouped_gemm_tall_kernel", "expert_down_bwd_pingpong_kernel",
)  # fmt: skip
ACTIVATION = ("_expert_activation_bwd_kernel", "expert_down_bwd_pingpong_kernel")
COPY = ("copy_rows_kernel",)


@pytest.mark.parametrize(
    ("names", "launched"),
    [
        # The numbers of dW products, other products, activation backwards and moved rows.
        (["hidden_states"], (0, 2, 1, 0)),
        (["gate_up_proj"], (1, 1, 1, 1)),
        (["down_proj"], (1, 0, 1, 1)),
        (["topk_weights"], (0, 1, 1, 0)),
        (["down_bias"], (0, 0, 0, 1)),
        (["hidden_states", "gate_up_proj", "down_proj", "topk_weights"], (2, 2, 1, 2)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_frozen_arguments_cost_no_kernel(names, launched):
    given = problem((2000, 4, 8, 512, 256), torch.bfloat16, bias="down_bias" in names)
    found = kernels_of(given, names)
    counted = tuple(
        sum(name in kernels for name in found) for kernels in (DW, GEMM, ACTIVATION, COPY)
    )
    assert counted == launched, found


def test_decoding_in_a_graph():
    """The graph is replayed on other tokens, with another routing, and equals eager."""
    given = problem((4, 4, 32, 512, 256), torch.bfloat16).arguments
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        moe.fused_experts(**given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = moe.fused_experts(**given)
    for seed in range(3):
        given["hidden_states"].copy_(torch.randn_like(given["hidden_states"]))
        given["topk_ids"].copy_(reference.route("uniform", 4, 32, 4, DEVICE, seed))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(output, moe.fused_experts(**given))
        want = reference.fused_experts(**given)
        assert_rows_close(output, want, torch.bfloat16, f"replay {seed}")
