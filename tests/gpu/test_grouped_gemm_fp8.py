# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm_fp8 and its gradients are right at sizes of several tiles and scales.

T tokens, K top_k, R = T * K rows, E experts, N out_features, D in_features.
"""

import pytest
import torch

from testing import reference
from testing.checks import assert_rows_close
from testing.gemm_problem import (
    FP8_MODES,
    check,
    check_every_code,
    fp8_problem,
)
from testing.on_device import DEVICE, DTYPES

pytestmark = pytest.mark.gpu

moe = torch.ops.moe

# T, K, E, N, D: many rows an expert, then few. 128 divides some widths. Descriptors can read others
# that 128 does not divide, and cannot read the odd ones.
SHAPES = {
    "even": (1000, 2, 4, 512, 256),
    "moonlight": (900, 3, 6, 704, 160),
    "odd": (801, 2, 5, 129, 257),
    "narrow": (700, 2, 4, 1, 1),
    "some-rows": (200, 2, 8, 384, 320),
    "decode-32": (64, 4, 16, 256, 384),
    "decode": (6, 4, 32, 256, 512),
    "decode-odd": (3, 2, 8, 67, 131),
}
# Qwen3-30B-A3B's FP8 checkpoint has such weights, and so has DeepSeek-V3 (fewer experts here).
REAL = {
    "qwen3-30b up": (512, 8, 128, 1536, 2048),
    "qwen3-30b down": (512, 8, 128, 2048, 768),
    "deepseek-v3 up": (1024, 8, 16, 4096, 7168),
}
LAYOUTS = ("contiguous", "transposed", "padded", "expert-last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", FP8_MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_and_flags(shape, mode, dtype):
    for routing in ("uniform", "dropped"):
        check(fp8_problem(SHAPES[shape], dtype, routing=routing, **FP8_MODES[mode]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["permute_x", "permute_y-weights"])
@pytest.mark.parametrize("shape", ["even", "odd", "decode"])
def test_strides_of_the_weight(layout, mode, shape):
    check(fp8_problem(SHAPES[shape], torch.bfloat16, layout=layout, **FP8_MODES[mode]))


@pytest.mark.parametrize("routing", reference.ROUTINGS)
@pytest.mark.parametrize("shape", ["even", "decode"])
def test_routings(shape, routing):
    flags = FP8_MODES["permute_y-weights"]
    check(fp8_problem(SHAPES[shape], torch.bfloat16, routing=routing, **flags))


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("mode", ["permute_x", "permute_y-weights"])
def test_real_sizes(shape, mode):
    check(fp8_problem(REAL[shape], torch.bfloat16, **FP8_MODES[mode]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", FP8_MODES)
@pytest.mark.parametrize("shape", ["even", "odd", "decode"])
def test_rounds_once(shape, mode, dtype):
    """The weight is never rounded to the rows' dtype.

    That would move about every fourth element by one unit in the last place. Sums in another order
    move a few.
    """
    given = fp8_problem(SHAPES[shape], dtype, **FP8_MODES[mode])
    output, _ = given.run()
    want, _ = given.expected()
    assert (output != want.to(dtype)).double().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(dtype):
    check_every_code(dtype, DEVICE)


def test_training_in_a_graph():
    """Forward and backward, replayed with other rows, weights and routing, equal eager."""
    shape, flags = (64, 4, 8, 512, 256), FP8_MODES["permute_x-weights"]
    given = fp8_problem(shape, torch.bfloat16, poison=False, **flags)
    static = given.arguments

    def step():
        leaves = [static[name].detach().requires_grad_() for name in ("input", "topk_weights")]
        named = dict(zip(("input", "topk_weights"), leaves, strict=True))
        output = moe.grouped_gemm_fp8(**{**static, **named})
        return [output.detach(), *torch.autograd.grad(output, leaves, given.grad_output)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in range(3):
        ids = reference.route("uniform", 64, 8, 4, DEVICE, seed + 1)
        counts, gather, _ = reference.routing_indices(ids, 8)
        static["token_counts"].copy_(counts)
        static["gather_indices"].copy_(gather)
        static["input"].copy_(torch.randn_like(static["input"]))
        static["weight"].copy_(torch.randn(static["weight"].shape, device=DEVICE))
        static["weight_scale"].copy_(torch.rand_like(static["weight_scale"]))
        graph.replay()
        for replayed, eager in zip(got, step(), strict=True):
            assert torch.equal(replayed, eager)
        want = reference.grouped_gemm_fp8(**static)
        assert_rows_close(got[0], want, torch.bfloat16, f"replay {seed}")
