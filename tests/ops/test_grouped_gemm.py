# SPDX-License-Identifier: Apache-2.0
"""These tests are grouped_gemm's own. test_every_op.py holds what every op must do.

M rows, D in_features, N out_features, E experts, T tokens, K top_k.
"""

import itertools

import hypothesis
import pytest
import torch

from moe_ops._core.library import SCHEMAS
from testing import boundaries, checks, oracle
from testing.gemm_problem import MODES
from testing.strategies import PRESENT, Sample, seeded_sample

moe = torch.ops.moe
CPU = torch.device("cpu")
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
permutations = pytest.mark.parametrize(
    ("permute_x", "permute_y"), [(False, False), (True, False), (False, True)]
)
FLAGS = [(x, y, w, b) for x, y, w, b in itertools.product((False, True), repeat=4) if not (x and y)]


def gemm(
    routing: str = "uniform",
    dtype: torch.dtype = torch.float32,
    permute_x: bool = False,
    permute_y: bool = False,
    weighted: bool = True,
    biased: bool = True,
    seed: int = 0,
    **fixed,
) -> Sample:
    sizes = {"T": 9, "D": 17, "N": 8, "E": 4, "top_k": 4 if routing == "every_expert" else 2}
    return seeded_sample(
        SCHEMAS["grouped_gemm"], seed,
        **{**sizes, "layout": "contiguous", **fixed},
        routing=routing, dtype=dtype, permute_x=permute_x, permute_y=permute_y,
        gather_indices=PRESENT,
        topk_weights=PRESENT if weighted else None,
        bias=PRESENT if biased else None,
    )  # fmt: skip


def tail_rows(sample: Sample) -> torch.Tensor:
    """Return which rows in expert order belong to no expert."""
    arguments = sample.arguments
    num_rows = sample().shape[0]
    return torch.arange(num_rows) >= arguments["token_counts"].sum()


def gradients(sample: Sample, **replaced):
    arguments = {**sample.requiring_grad(), **replaced}
    names = sample.differentiable()
    output = sample(**arguments)
    tangent = torch.ones_like(output)
    found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("routing", oracle.ROUTINGS)
@pytest.mark.parametrize(("permute_x", "permute_y", "weighted", "biased"), FLAGS)
def test_every_flag_and_routing(routing, permute_x, permute_y, weighted, biased):
    sample = gemm(routing, torch.float32, permute_x, permute_y, weighted, biased)
    assert sample.routing == routing
    with checks.poisoned_memory():
        output = sample()
        found = gradients(sample)
    checks.assert_matches_oracle(sample, output)
    tangent = torch.ones_like(output)
    scales = checks.gradient_scales(sample, tangent)
    for name, expected in checks.oracle_gradients(sample, tangent).items():
        checks.assert_close(found[name], expected, scale=scales[name], what=name)


@permutations
def test_dropped_rows_are_exactly_zero_and_never_read(permute_x, permute_y):
    sample = gemm("dropped", permute_x=permute_x, permute_y=permute_y)
    arguments = sample.arguments
    tail = tail_rows(sample)
    assert 0 < tail.sum() < len(tail)
    slots = arguments["gather_indices"].long()
    dropped_slots = torch.zeros_like(tail)
    dropped_slots[slots[tail]] = True

    poisoned = dict(arguments)
    poisoned["topk_weights"] = arguments["topk_weights"].masked_fill(
        dropped_slots.view_as(arguments["topk_weights"]), float("nan")
    )
    # With permute_x a token whose slots are all dropped is not read.
    tokens_without_rows = dropped_slots.view(-1, arguments["top_k"]).all(1)
    unread = tokens_without_rows if permute_x else tail
    poisoned["input"] = arguments["input"].masked_fill(unread[:, None], float("nan"))

    output_rows = dropped_slots if permute_y else tail
    output = sample(**poisoned)
    assert torch.equal(output, sample())
    assert (output[output_rows] == 0).all()

    leaves = {name: poisoned[name].detach().requires_grad_() for name in sample.differentiable()}
    result = sample(**{**poisoned, **leaves})
    tangent = torch.randn(result.shape).masked_fill(output_rows[:, None], float("nan"))
    found = dict(
        zip(leaves, torch.autograd.grad(result, list(leaves.values()), tangent), strict=True)
    )
    assert (found["topk_weights"].flatten()[dropped_slots] == 0).all()
    assert (found["input"][unread] == 0).all()
    clean = checks.oracle_gradients(sample, tangent.nan_to_num())
    for name, expected in clean.items():
        checks.assert_close(found[name], expected, what=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", boundaries.TAILS)
@dtypes
def test_tails_of_no_row_of_one_and_of_many(dtype, tail, mode):
    """Both in a loop over the experts and in torch's grouped product."""
    for widths in boundaries.TAIL_WIDTHS:
        for counts in ((2, 2, 2, 2), (8, 0, 0, 0), (0, 0, 0, 8)):
            given = boundaries.tail_problem(
                tail, dtype, widths=widths, counts=counts, device=CPU, **MODES[mode]
            )
            boundaries.check_tail(given, tail)


@permutations
@dtypes
def test_empty_experts_have_exactly_zero_gradients(permute_x, permute_y, dtype):
    sample = gemm("hot", dtype, permute_x, permute_y)
    with checks.poisoned_memory():
        found = gradients(sample)
    empty = sample.arguments["token_counts"] == 0
    assert empty.any()
    assert (found["weight"][empty] == 0).all()
    assert (found["bias"][empty] == 0).all()
    assert (found["weight"][~empty] != 0).any()


@permutations
@dtypes
def test_no_tokens(permute_x, permute_y, dtype):
    sample = gemm("uniform", dtype, permute_x, permute_y, T=0)
    with checks.poisoned_memory():
        found = gradients(sample)
    assert sample().shape == (0, 8)
    for name in ("weight", "bias"):
        assert found[name].shape == sample.arguments[name].shape
        assert (found[name] == 0).all()
    assert found["input"].shape == sample.arguments["input"].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("permute_x", "permute_y", "weighted", "biased"), FLAGS)
def test_rounds_once(dtype, permute_x, permute_y, weighted, biased):
    """Products, bias and weight are computed in fp32 and rounded once.

    One more rounding would move about every fourth element by one unit in the last place.
    """
    sample = gemm("uniform", dtype, permute_x, permute_y, weighted, biased, T=60, D=40, N=40)
    if weighted:
        topk_weights = torch.rand(60, 2) + 0.1
        sample.arguments["topk_weights"] = topk_weights
    expected = oracle.grouped_gemm(**sample.arguments)
    differs = sample() != expected.to(dtype)
    assert differs.double().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("permute_y", [False, True])
def test_weighted_gradients_round_once(dtype, permute_y):
    """The router weight is multiplied in fp32 on the way back too.

    For the gradient of the weight that product is an operand of a GEMM, and may be rounded.
    """
    sample = gemm("uniform", dtype, False, permute_y, T=60, D=40, N=40)
    sample.arguments["topk_weights"] = torch.rand(60, 2) + 0.1
    arguments = sample.requiring_grad()
    output = sample(**arguments)
    tangent = torch.randn_like(output)
    names = ["input", "bias", "topk_weights"]
    found = torch.autograd.grad(output, [arguments[n] for n in names], tangent)
    expected = checks.oracle_gradients(sample, tangent)
    for name, grad in zip(names[:2], found[:2], strict=True):
        differs = grad != expected[name].to(dtype)
        assert differs.double().mean() < 0.02, name
    # It is not rounded to the dtype of the rows.
    assert found[2].dtype == torch.float32
    checks.assert_close(found[2], expected["topk_weights"])


@permutations
def test_equals_the_unfused_composition(permute_x, permute_y):
    sample = gemm("dropped", torch.float64, permute_x, permute_y)
    arguments = sample.arguments
    gather, top_k = arguments["gather_indices"], arguments["top_k"]
    rows, topk_weights = arguments["input"], arguments["topk_weights"]
    if permute_x:
        rows = moe.permute(rows, gather, top_k)
    composed = moe.grouped_gemm(
        rows, arguments["weight"], arguments["token_counts"], None, None, arguments["bias"]
    )
    composed = composed * topk_weights.flatten()[gather.long(), None]
    if permute_y:
        composed = torch.zeros_like(composed).index_copy_(0, gather.long(), composed)
    checks.assert_close(sample(), composed)


def test_without_gather_indices_a_row_is_its_own_slot():
    sample = gemm()
    in_order = torch.arange(sample.arguments["gather_indices"].numel(), dtype=torch.int32)
    assert torch.equal(sample(gather_indices=None), sample(gather_indices=in_order))


@pytest.mark.parametrize("stored", ["(E, N, D)", "(E, D, N)"])
def test_weight_gradient_has_the_strides_of_the_weight(stored):
    """With others AccumulateGrad would copy it."""
    counts = torch.tensor([3, 0, 4])
    shape = (3, 5, 6) if stored == "(E, N, D)" else (3, 6, 5)
    parameter = torch.randn(shape, requires_grad=True)
    weight = parameter if stored == "(E, N, D)" else parameter.transpose(1, 2)
    kept: dict[str, torch.Tensor] = {}
    weight.register_hook(lambda grad: kept.update(grad=grad))
    moe.grouped_gemm(torch.randn(7, 6), weight, counts).sum().backward()
    assert kept["grad"].stride() == weight.stride()
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()


def test_gradients_not_needed_are_not_allocated():
    sample = gemm(permute_x=True)
    a = sample.arguments
    flags = (a["top_k"], True, False)
    routing = (a["token_counts"], a["gather_indices"], a["topk_weights"])
    grad_output = torch.randn(18, 8)
    for needs in itertools.product([False, True], repeat=2):
        dx = moe.grouped_gemm_dx(
            grad_output, a["weight"], *routing, a["input"], a["bias"], *flags, list(needs)
        )
        dw = moe.grouped_gemm_dw(grad_output, a["input"], *routing, *flags, list(needs), False)
        for needed, output in zip((*needs, *needs), (*dx, *dw), strict=True):
            assert (output.untyped_storage().nbytes() > 0) == needed


@hypothesis.given(
    num_rows=hypothesis.strategies.sampled_from([1, 33, 100]),
    in_features=hypothesis.strategies.sampled_from([96, 704]),
    out_features=hypothesis.strategies.sampled_from([48, 129, 704]),
    dtype=hypothesis.strategies.sampled_from(FLOATING),
)
@hypothesis.settings(max_examples=12)
def test_sizes_that_no_block_divides(num_rows, in_features, out_features, dtype):
    generator = torch.Generator().manual_seed(num_rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    counts = torch.tensor([0, num_rows // 3, num_rows - num_rows // 3])
    rows = randn(num_rows, in_features).requires_grad_()
    weight = randn(3, out_features, in_features).requires_grad_()
    output = moe.grouped_gemm(rows, weight, counts)
    tangent = randn(*output.shape)
    found = torch.autograd.grad(output, (rows, weight), tangent)
    call = {"input": rows, "weight": weight, "token_counts": counts}
    checks.assert_close(output, oracle.grouped_gemm(rows, weight, counts))
    expected = oracle.gradients(oracle.grouped_gemm, call, ["input", "weight"], tangent)
    for got, want in zip(found, expected.values(), strict=True):
        checks.assert_close(got, want)


def test_bitwise_repeatable_at_a_size_that_uses_threads():
    counts = torch.tensor([700, 0, 1, 299])
    rows = torch.randn(1000, 256, requires_grad=True)
    weight = torch.randn(4, 256, 256, requires_grad=True)
    bias = torch.randn(4, 256, requires_grad=True)
    tangent = torch.randn(1000, 256)

    def run():
        output = moe.grouped_gemm(rows, weight, counts, bias=bias)
        return (output, *torch.autograd.grad(output, (rows, weight, bias), tangent))

    first = run()
    for _ in range(3):
        for got, want in zip(run(), first, strict=True):
            assert torch.equal(got, want)


DEQUANTISE = "dequantise it to the dtype of input, or make a moe_ops.QuantizedWeight of it"
QUANTISED = {
    torch.float8_e4m3fn: "moe_ops.QuantizedWeight.from_fp8_block takes it, with its scales",
    torch.float8_e5m2: DEQUANTISE,
    torch.int8: DEQUANTISE,
    torch.uint8: DEQUANTISE,
}


def test_counts_are_read_at_every_call():
    """They are, if the tensor is the same, and if they were seen in inference mode before."""
    x, weight = torch.randn(12, 8), torch.randn(3, 16, 8)
    x.requires_grad_(), weight.requires_grad_()
    counts = torch.zeros(3, dtype=torch.int32)
    for new in ([4, 4, 4], [0, 12, 0], [5, 0, 3], [4, 4, 4]):
        counts.copy_(torch.tensor(new))
        with torch.inference_mode():
            inferred = moe.grouped_gemm(x, weight, counts)
        output = moe.grouped_gemm(x, weight, counts)
        torch.autograd.grad(output.sum(), (x, weight))
        parts = x.split([*new, 12 - sum(new)])
        wanted = [part @ w.t() for part, w in zip(parts, weight, strict=False)]
        torch.testing.assert_close(output, torch.cat([*wanted, torch.zeros(len(parts[-1]), 16)]))
        assert torch.equal(output, inferred)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_rejects_a_quantised_weight(dtype, requires_grad):
    """The error says what to do."""
    arguments = {
        "input": torch.randn(4, 8, requires_grad=requires_grad),
        "weight": torch.ones(2, 4, 8).to(dtype),
        "token_counts": torch.tensor([2, 2]),
    }
    got = checks.assert_rejects(TypeError, (), moe.grouped_gemm, arguments)
    name = str(dtype).removeprefix("torch.")
    assert got == (
        "moe::grouped_gemm: expected weight.dtype == input.dtype (float32), "
        f"got {name}; {QUANTISED[dtype]}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_that_a_plain_product_leaves_out(dtype):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 4], dtype=torch.int32)
    x, dy = (torch.randn(9, n, generator=generator).to(dtype) for n in (8, 16))
    weight = torch.randn(3, 16, 8, generator=generator).to(dtype)
    plain = (1, False, False, [True, False])
    dx, unneeded = moe.grouped_gemm_dx(dy, weight, counts)
    full = moe.grouped_gemm_dx(dy, weight, counts, None, None, None, None, *plain)
    assert torch.equal(dx, full[0])
    assert unneeded.shape == full[1].shape == (0,)
    dw, unneeded = moe.grouped_gemm_dw(dy, x, counts)
    full = moe.grouped_gemm_dw(dy, x, counts, None, None, *plain, False)
    assert torch.equal(dw, full[0])
    assert unneeded.shape == full[1].shape == (0,)
    expected = oracle.gradients(
        oracle.grouped_gemm,
        {"input": x, "weight": weight, "token_counts": counts},
        ["input", "weight"],
        dy,
    )
    checks.assert_close(dx, expected["input"])
    checks.assert_close(dw, expected["weight"])
    with pytest.raises(ValueError, match=r"expected weight.shape\[1\] == grad_output.shape\[1\]"):
        moe.grouped_gemm_dx(x, weight, counts)
    with pytest.raises(ValueError, match=r"expected input.shape\[0\] == "):
        moe.grouped_gemm_dw(dy, x[1:], counts)
