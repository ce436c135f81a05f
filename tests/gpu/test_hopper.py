# SPDX-License-Identifier: Apache-2.0
"""The kernels for Hopper give what fp64 and the kernels for every GPU give.

T tokens, K top_k, R = T * K rows, E experts, N out_features, D in_features.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ops
from moe_ops._triton.schedule import expert_offsets
from moe_ops._triton.weight_gradient import grad_weight
from testing import experts_problem
from testing.gemm_problem import check, problem
from testing.launches import Launches, launches
from testing.on_device import DEVICE, memory_slot

pytestmark = pytest.mark.gpu

# Every dimension of the last shape is only a part of a tile.
SHAPES = [(1500, 2, 4, 512, 768), (700, 4, 6, 712, 328), (300, 2, 3, 8, 16)]
# Rows, columns, contracted elements, stages, epilogue_subtile. Cooperative groups share a tile,
# ping-pong groups have tiles of their own. Tall tiles are cooperative ones, and no dW has them.
COOPERATIVE_TILES = [(128, 256, 64, 3), (128, 256, 32, 6), (256, 128, 64, 2)]
PINGPONG_TILES = [(128, 128, 64, 4), (128, 128, 64, 5), (128, 128, 64, 6, 2), (128, 128, 32, 8, 2)]
TALL_TILES = [(192, 256, 64, 3), (192, 256, 32, 6)]
TILES = [*COOPERATIVE_TILES, *TALL_TILES, *PINGPONG_TILES]
ROUTINGS = ("uniform", "zipf", "hot_and_empty", "dropped", "all_dropped")


def config(rows: int, columns: int, depth: int, stages: int, subtile: int = 1) -> str:
    common: dict[str, Any] = {
        "num_warps": 8, "num_stages": stages, "use_tma_store": True, "warp_specialize": True,
        "epilogue_subtile": subtile,
    }  # fmt: skip
    return moe_ops.kernel_config(
        moe_ops.KernelConfigForward(
            BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth,
            use_tma_load_x=True, use_tma_load_w=True, **common,
        ),
        moe_ops.KernelConfigBackward_dX(
            BLOCK_M=rows, BLOCK_K=columns, BLOCK_N=depth,
            use_tma_load_dy=True, use_tma_load_w=True, **common,
        ),
        moe_ops.KernelConfigBackward_dW(
            BLOCK_N=128 if rows == 192 else rows, BLOCK_K=columns, BLOCK_M=depth,
            use_tma_load_dy=True, use_tma_load_x=True, **common,
        ),
    )  # fmt: skip


@pytest.fixture
def launched():
    """Record the kernels that the test launches."""
    with launches() as found:
        yield found


def served(launched: Launches, product: str) -> tuple[int, int]:
    """Return how often a kernel for Hopper computed the product, and how often the general one."""
    return launched.specialized(product), launched.persistent(product)


CASES = [
    (shape, tile, (torch.bfloat16, torch.float16)[i % 2], ("contiguous", "transposed")[i // 2 % 2],
     ROUTINGS[i % 5])
    for i, (shape, tile) in enumerate(itertools.product(SHAPES, TILES))
]  # fmt: skip


@pytest.mark.parametrize(("shape", "tile", "dtype", "layout", "routing"), CASES)
def test_forward_and_gradients(shape, tile, dtype, layout, routing, launched):
    given = problem(shape, dtype, routing=routing, layout=layout)
    given.arguments["kernel_config"] = config(*tile)
    check(given)
    assert served(launched, "gemm") == (2, 0)
    assert served(launched, "dw") == (1, 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", TALL_TILES)
def test_tall_tiles_of_any_number_of_rows(tile, transposed, launched):
    """A tile has one, two or three parts, and those that share an expert have three."""
    numbers = [0, 1, 63, 64, 65, 127, 128, 0, 129, 191, 192, 193, 256, 320, 384, 385, 5]
    counts = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    # The last rows have no expert.
    num_rows, sizes = sum(numbers) + 70, (512, 320)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(torch.bfloat16)

    x, dy = random(num_rows, sizes[1]), random(num_rows, sizes[0])
    weight = random(len(numbers), *sizes) / 16
    if transposed:
        weight = weight.mT.contiguous().mT
    given = config(*tile)
    y = torch.ops.moe.grouped_gemm(x, weight, counts, kernel_config=given)
    dx, *_ = torch.ops.moe.grouped_gemm_dx(dy, weight, counts, kernel_config=given)
    for found, rows, matrices in ((y, x, weight.mT), (dx, dy, weight)):
        first = 0
        for count, matrix in zip(numbers, matrices, strict=True):
            exact = rows[first : first + count].double() @ matrix.double()
            torch.testing.assert_close(
                found[first : first + count].double(), exact, rtol=0.02, atol=0.02
            )
            first += count
        assert not found[first:].any()
    assert launched.names.count("grouped_gemm_tall_kernel") == 2


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("permute_y", [False, True])
def test_scattered_rows(permute_y, routing, launched):
    """permute_y scatters rows in forward, permute_x in the gradient."""
    for shape, tile in zip(SHAPES, PINGPONG_TILES[1:], strict=True):
        given = problem(
            shape, torch.bfloat16, routing=routing, permute_x=not permute_y, permute_y=permute_y
        )
        given.arguments["kernel_config"] = config(*tile)
        check(given)
    # The forward of permute_x and the dX of permute_y gather.
    assert served(launched, "gemm") == (3, 3)


FINISHES: dict[str, dict[str, Any]] = {
    "permute_y": {"permute_y": True},
    "bias": {"bias": True},
    "weights": {"weights": True},
    "weights-bias": {"weights": True, "bias": True},
    "permute_y-bias": {"permute_y": True, "bias": True},
    "permute_y-weights": {"permute_y": True, "weights": True},
    "permute_y-weights-bias": {"permute_y": True, "weights": True, "bias": True},
}


def finished(shape, finish, routing="uniform"):
    given = problem(shape, torch.bfloat16, routing=routing, **FINISHES[finish])
    if "weights" in finish:
        # Other kernels sum up its gradient.
        given.differentiable.remove("topk_weights")
    return given


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("finish", FINISHES)
def test_bias_scale_and_scattered_rows(finish, routing, launched):
    for shape, tile in zip(SHAPES, PINGPONG_TILES[1:], strict=True):
        given = finished(shape, finish, routing)
        given.arguments["kernel_config"] = config(*tile)
        check(given)
    # With permute_y dX gathers.
    gathers = len(SHAPES) * ("permute_y" in finish)
    assert served(launched, "gemm") == (2 * len(SHAPES) - gathers, gathers)


@pytest.mark.parametrize("finish", FINISHES)
def test_what_shared_tiles_do_not_have_is_left_to_the_other_kernels(finish, launched):
    given = finished(SHAPES[0], finish)
    given.arguments["kernel_config"] = config(*COOPERATIVE_TILES[0])
    check(given)
    # dX adds no bias.
    count = int(finish == "bias")
    assert served(launched, "gemm") == (count, 2 - count)


def test_what_descriptors_cannot_describe_is_served_by_the_other_kernels(launched):
    given = problem((600, 2, 3, 100, 68), torch.bfloat16)
    given.arguments["kernel_config"] = config(*TILES[0])
    check(given)
    assert served(launched, "gemm") == (0, 2)
    assert served(launched, "dw") == (0, 1)


@pytest.mark.parametrize("permute_y", [False, True])
def test_is_chosen_without_a_configuration(permute_y, launched):
    check(problem((1500, 2, 4, 512, 768), torch.bfloat16, permute_y=permute_y))
    assert served(launched, "gemm") == ((1, 1) if permute_y else (2, 0))
    assert served(launched, "dw") == (1, 0)


# T, K, E, H, I: the second ends in a part of a tile in every dimension.
EXPERTS_SHAPES = [(1000, 2, 4, 256, 512), (700, 4, 8, 96, 360)]
EXPERTS_MODES: dict[str, dict[str, Any]] = {
    **{name: experts_problem.MODES[name] for name in ("swiglu", "swiglu-recompute", "llama4")},
    "bounded": {"activation": "gelu_tanh", "activation_limit": 0.7},
}
# The router gradient's rows leave no shared memory for the wider tiles.
EXPERTS_TILES = (*COOPERATIVE_TILES[:2], TALL_TILES[0], *PINGPONG_TILES)
EXPERTS_CASES = [
    (
        shape,
        mode,
        PINGPONG_TILES[0] if mode == "llama4" else EXPERTS_TILES[i % 7],
        (torch.bfloat16, torch.float16)[i // 2 % 2],
        ROUTINGS[i % 5],
    )
    for i, (shape, mode) in enumerate(itertools.product(EXPERTS_SHAPES, list(EXPERTS_MODES) * 3))
]


@pytest.mark.parametrize(("shape", "mode", "tile", "dtype", "routing"), EXPERTS_CASES)
def test_experts(shape, mode, tile, dtype, routing, launched):
    given = experts_problem.problem(shape, dtype, routing=routing, **EXPERTS_MODES[mode])
    given.arguments["kernel_config"] = config(*tile)
    experts_problem.check(given)
    # It runs in forward without and with a gradient, and again in backward if nothing was kept.
    times = 3 if "recompute" in mode else 2
    is_pingpong = tile in PINGPONG_TILES
    assert served(launched, "up") == ((times, 0) if is_pingpong else (0, times))
    # With weights before the experts, dX sums up the router gradient.
    assert launched.persistent("gemm") == (mode == "llama4")
    assert served(launched, "dw") == (2, 0)
    assert served(launched, "down") == ((1, 0) if is_pingpong else (0, 1))


def test_biases_beside_tall_tiles(launched):
    """The router gradient of a bias is summed by another kernel, which needs a schedule."""
    given = experts_problem.problem(
        EXPERTS_SHAPES[0], torch.bfloat16, routing="zipf", **experts_problem.MODES["gpt-oss"]
    )
    given.arguments["kernel_config"] = config(*TALL_TILES[0])
    experts_problem.check(given)
    assert "grouped_gemm_tall_kernel" in launched.names


def test_adapters_beside_tall_tiles(launched):
    """A kernel of its own adds an adapter's second product, and needs a schedule, too."""
    num_tokens, top_k, num_experts, hidden, inter = EXPERTS_SHAPES[0]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=DEVICE) / shape[-1] ** 0.5
        return drawn.to(torch.bfloat16)

    x, grad_output = random(num_tokens, hidden), random(num_tokens, hidden)
    up, down = random(num_experts, 2 * inter, hidden), random(num_experts, hidden, inter)
    adapters = [
        random(num_experts, *sizes)
        for sizes in ((16, hidden), (2 * inter, 16), (16, inter), (hidden, 16))
    ]
    topk_ids = torch.rand(num_tokens, num_experts, generator=generator, device=DEVICE)
    topk_ids = topk_ids.topk(top_k, 1).indices
    weights = torch.rand(num_tokens, top_k, generator=generator, device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (x, *adapters, weights)]
    results = []
    for tile in (TALL_TILES[0], COOPERATIVE_TILES[0]):
        output = torch.ops.moe.fused_experts_lora(
            x, up, down, topk_ids, weights, *adapters, kernel_config=config(*tile)
        )
        results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
    assert launched.names.count("grouped_gemm_tall_kernel") == 3
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


FROZEN_MODES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu-tanh-bias": {"activation": "gelu_tanh", "bias": True, "activation_limit": 0.7},
}


@pytest.mark.parametrize("mode", FROZEN_MODES)
@pytest.mark.parametrize("frozen", ["topk_weights", "gate_up_proj", "hidden_states", "down_proj"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_experts_with_a_frozen_argument(mode, frozen, layout, launched):
    """The down projection's backward also works without the parts that one gradient needs."""
    given = experts_problem.problem(
        EXPERTS_SHAPES[1], torch.bfloat16, layout=layout, **FROZEN_MODES[mode]
    )
    given.differentiable.remove(frozen)
    given.arguments["kernel_config"] = config(*PINGPONG_TILES[0])
    experts_problem.check(given)
    # If neither down_proj nor its bias needs a gradient, the rows of dY are gathered, not moved.
    is_moved = frozen != "down_proj" or "bias" in mode
    assert served(launched, "down") == ((1, 0) if is_moved else (0, 1))


def test_the_backward_of_experts_is_repeatable():
    given = experts_problem.problem(EXPERTS_SHAPES[0], torch.bfloat16, routing="zipf")
    given.arguments["kernel_config"] = config(*PINGPONG_TILES[0])
    _, expected = given.run()
    for _ in range(20):
        _, found = given.run()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("activation", ["relu", "swiglu_oai", "gelu", "gelu_tanh", "relu_squared"])
def test_activations_in_turns(activation, launched):
    given = experts_problem.problem(
        EXPERTS_SHAPES[1], torch.bfloat16, routing="zipf", activation=activation
    )
    given.arguments["kernel_config"] = config(*PINGPONG_TILES[0])
    experts_problem.check(given)
    # Hopper has no kernel of the down projection's backward with "gelu".
    assert served(launched, "down") == ((0, 1) if activation == "gelu" else (1, 0))


# These modes have biases, or gate and up rows that take turns.
UP_MODES: dict[str, dict[str, Any]] = {
    **{
        name: experts_problem.MODES[name]
        for name in ("gpt-oss", "geglu-bias", "geglu-tanh-interleaved", "reglu-before-bias")
    },
    "gpt-oss-recompute": {**experts_problem.MODES["gpt-oss"], "recompute": "pre_activation"},
}
UP_CASES = [
    (
        shape,
        mode,
        PINGPONG_TILES[0] if mode == "reglu-before-bias" else PINGPONG_TILES[i % 4],
        (torch.bfloat16, torch.float16)[i // 2 % 2],
        ROUTINGS[i % 5],
    )
    for i, (shape, mode) in enumerate(itertools.product(EXPERTS_SHAPES, list(UP_MODES) * 2))
]


@pytest.mark.parametrize(("shape", "mode", "tile", "dtype", "routing"), UP_CASES)
def test_biases_and_interleaved_rows_in_turns(shape, mode, tile, dtype, routing, launched):
    given = experts_problem.problem(shape, dtype, routing=routing, **UP_MODES[mode])
    given.arguments["kernel_config"] = config(*tile)
    experts_problem.check(given)
    assert served(launched, "up") == (3 if "recompute" in mode else 2, 0)
    # Hopper has no kernel of the down projection's backward with interleaved rows or "gelu".
    assert served(launched, "down") == ((1, 0) if mode == "reglu-before-bias" else (0, 1))


def test_the_up_projection_with_biases_is_chosen_without_a_configuration(launched):
    given = experts_problem.problem(
        EXPERTS_SHAPES[0], torch.bfloat16, **experts_problem.MODES["gpt-oss"]
    )
    experts_problem.check(given)
    assert served(launched, "up") == (2, 0)


@pytest.mark.parametrize("mode", ["gpt-oss", "geglu-bias", "geglu-tanh-interleaved", "ungated"])
def test_other_experts_are_served_by_the_other_kernels(mode, launched):
    given = experts_problem.problem(
        EXPERTS_SHAPES[0], torch.bfloat16, **experts_problem.MODES[mode]
    )
    given.arguments["kernel_config"] = config(*TILES[0])
    experts_problem.check(given)
    assert launched.specialized("up") == launched.specialized("down") == 0


def test_transposed_experts_are_served_by_the_other_kernels(launched):
    given = experts_problem.problem(EXPERTS_SHAPES[0], torch.bfloat16, layout="transposed")
    given.arguments["kernel_config"] = config(*TILES[0])
    experts_problem.check(given)
    assert launched.specialized("up") == 0


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return g (R, N), x (R, D) and the experts' offsets, for several tiles a program."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    counts = torch.randint(0, 400, (64,), generator=generator, device=DEVICE, dtype=torch.int32)
    num_rows = int(counts.sum())
    g, x = (
        torch.randn(num_rows, n, generator=generator, device=DEVICE).to(dtype) for n in (768, 1024)
    )
    return g, x, expert_offsets(counts, num_rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [COOPERATIVE_TILES[1], PINGPONG_TILES[2]])
def test_dw_is_that_of_the_other_kernel_bit_for_bit(tile, transposed):
    """Both add up the same products in the same order."""
    plain = moe_ops.kernel_config(backward_dW=moe_ops.KernelConfigBackward_dW(flatten=False))
    g, x, offsets = operands()
    expected = grad_weight(g, x, offsets, transposed, plain)
    for _ in range(20):
        found = grad_weight(g, x, offsets, transposed, config(*tile))
        assert torch.equal(found, expected)


def test_waits_for_nothing_under_a_graph(launched):
    given = problem((1500, 2, 4, 512, 768), torch.bfloat16, routing="zipf", poison=False)
    arguments = {**given.arguments, "kernel_config": config(*TILES[0])}
    expected = torch.ops.moe.grouped_gemm(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.moe.grouped_gemm(**arguments)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, expected)
    assert served(launched, "gemm") == (2, 0)


def test_weights_of_more_than_2_31_elements(launched):
    """Only the last expert has rows, so its weight lies past 2^31 elements."""
    with memory_slot():
        check_weights_of_more_than_2_31_elements()
    assert served(launched, "gemm") == (1, 0)


def check_weights_of_more_than_2_31_elements():
    num_experts, out_features, in_features = 70, 4096, 7680
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    counts[-1] = 200
    x = torch.randn(200, in_features, device=DEVICE).bfloat16()
    g = torch.randn(200, out_features, device=DEVICE).bfloat16()
    offsets = expert_offsets(counts, 200)
    dw = grad_weight(g, x, offsets, False, config(128, 256, 32, 6))
    assert dw.numel() > 2**31
    assert not dw[:-1].any()
    assert reference_error(dw[-1], g.float().t() @ x.float()) < 4e-3
    y = torch.ops.moe.grouped_gemm(g, dw.transpose(1, 2), counts, kernel_config=config(*TILES[0]))
    assert reference_error(y, g.float() @ dw[-1].float()) < 4e-3


def reference_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())
