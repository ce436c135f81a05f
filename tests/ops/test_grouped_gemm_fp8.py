# SPDX-License-Identifier: Apache-2.0
"""These tests are grouped_gemm_fp8's own. test_every_op.py holds what every op must do.

M rows, D in_features, N out_features, E experts, T tokens, K top_k.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ops
from moe_ops import fp8
from testing import checks, oracle
from testing.gemm_problem import FP8_MODES, check, check_every_code, fp8_problem

moe = torch.ops.moe
FP8 = torch.float8_e4m3fn
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)
# permute_x, permute_y, weighted, without the two permutations together.
FLAGS = [(x, y, w) for x, y, w in itertools.product((False, True), repeat=3) if not (x and y)]
flags = pytest.mark.parametrize(("permute_x", "permute_y", "weighted"), FLAGS)
CPU = torch.device("cpu")
NUM_TOKENS, TOP_K, NUM_EXPERTS = 12, 2, 4


def call(
    routing: str = "dropped",
    dtype: torch.dtype = torch.float32,
    permute_x: bool = False,
    permute_y: bool = False,
    weighted: bool = True,
    sizes: tuple[int, int] = (200, 300),
    num_tokens: int = NUM_TOKENS,
) -> dict[str, Any]:
    """Return a call whose weights have several scales, the last ones for parts of a block."""
    generator = torch.Generator().manual_seed(0)
    ids = oracle.random_topk_ids(routing, num_tokens, NUM_EXPERTS, TOP_K, generator)
    counts, gather, _ = oracle.routing_indices(ids, NUM_EXPERTS)
    out_features, in_features = sizes
    num_rows = num_tokens if permute_x else num_tokens * TOP_K
    blocks = (-(-out_features // 128), -(-in_features // 128))
    return {
        "input": torch.randn(num_rows, in_features, generator=generator).to(dtype),
        "weight": torch.randn(NUM_EXPERTS, *sizes, generator=generator).mul(30).to(FP8),
        "weight_scale": torch.rand(NUM_EXPERTS, *blocks, generator=generator) / 30,
        "token_counts": counts,
        "gather_indices": gather,
        "topk_weights": torch.rand(num_tokens, TOP_K, generator=generator) if weighted else None,
        "top_k": TOP_K,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }


def with_leaves(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    named = {
        name: arguments[name].detach().requires_grad_()
        for name in ("input", "topk_weights")
        if arguments[name] is not None
    }
    return {**arguments, **named}, list(named.values())


@dtypes
@flags
def test_matches_reference(dtype, permute_x, permute_y, weighted):
    """The scales differ within a row and within a column."""
    arguments, leaves = with_leaves(call("dropped", dtype, permute_x, permute_y, weighted))
    with checks.poisoned_memory():
        output = moe.grouped_gemm_fp8(**arguments)
        tangent = torch.randn(output.shape).to(dtype)
        found = torch.autograd.grad(output, leaves, tangent)
    checks.assert_close(output, oracle.grouped_gemm_fp8(**arguments))
    names = [name for name in ("input", "topk_weights") if arguments[name] is not None]
    expected = oracle.gradients(oracle.grouped_gemm_fp8, arguments, names, tangent)
    for got, (name, want) in zip(found, expected.items(), strict=True):
        checks.assert_close(got, want, dtype=checks.coarser(got.dtype, dtype), what=name)


@flags
def test_is_grouped_gemm_of_the_dequantised_weight(permute_x, permute_y, weighted):
    arguments = call("uniform", torch.float32, permute_x, permute_y, weighted)
    weight, scale = arguments.pop("weight"), arguments.pop("weight_scale")
    expected = moe.grouped_gemm(
        weight=moe_ops.dequantize_fp8(weight, scale, torch.float32), **arguments
    )
    got = moe.grouped_gemm_fp8(weight=weight, weight_scale=scale, **arguments)
    checks.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@flags
def test_rounds_once(dtype, permute_x, permute_y, weighted):
    """Neither a weight is rounded to the rows' dtype, nor a product before its router weight.

    Either would move about every fourth element by one unit in the last place.
    """
    arguments, leaves = with_leaves(call("uniform", dtype, permute_x, permute_y, weighted))
    output = moe.grouped_gemm_fp8(**arguments)
    assert (output != oracle.grouped_gemm_fp8(**arguments).to(dtype)).double().mean() < 0.02
    if permute_x:
        # With permute_x the rows of a token's slots are rounded before they are summed.
        return
    tangent = torch.randn_like(output)
    (found, *_) = torch.autograd.grad(output, leaves, tangent)
    expected = oracle.gradients(oracle.grouped_gemm_fp8, arguments, ["input"], tangent)["input"]
    assert (found != expected.to(dtype)).double().mean() < 0.02


@pytest.mark.parametrize("routing", [r for r in oracle.ROUTINGS if r != "every_expert"])
def test_routings(routing):
    for permute_x, permute_y, _ in FLAGS[::2]:
        arguments, leaves = with_leaves(
            call(routing, permute_x=permute_x, permute_y=permute_y, sizes=(20, 140))
        )
        with checks.poisoned_memory():
            output = moe.grouped_gemm_fp8(**arguments)
            found = torch.autograd.grad(output, leaves, torch.ones_like(output))
        checks.assert_close(output, oracle.grouped_gemm_fp8(**arguments))
        names = ["input", "topk_weights"]
        expected = oracle.gradients(
            oracle.grouped_gemm_fp8, arguments, names, torch.ones_like(output)
        )
        for name, got in zip(names, found, strict=True):
            checks.assert_close(got, expected[name], what=name)


@pytest.mark.parametrize("mode", FP8_MODES)
@pytest.mark.parametrize("routing", ["dropped", "all_dropped"])
def test_dropped_rows_are_zero_and_never_read(mode, routing):
    """They hold NaN here, and so do their router weights and gradients."""
    flags = FP8_MODES[mode]
    check(fp8_problem((9, 2, 3, 136, 140), torch.float32, routing=routing, device=CPU, **flags))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_code(dtype):
    check_every_code(dtype, CPU)


def test_the_weight_has_no_gradient_and_nothing_of_its_size_is_kept():
    """What is kept are given tensors, and the rows only for the router gradient."""
    arguments, _ = with_leaves(call(weighted=False))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = moe.grouped_gemm_fp8(**arguments)
    given = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    assert {tensor.data_ptr() for tensor in kept} <= given
    assert arguments["input"].data_ptr() not in {tensor.data_ptr() for tensor in kept}
    scale = arguments["weight_scale"].requires_grad_()
    (gradient,) = torch.autograd.grad(output.sum(), [scale], allow_unused=True)
    assert gradient is None


def test_one_expert_is_dequantised_at_a_time(monkeypatch):
    """An expert without rows is not dequantised at all."""
    made: list[tuple[int, ...]] = []

    def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(tuple(weight.shape))
        return fp8.dequantized(weight, scale, dtype)

    monkeypatch.setattr("moe_ops.ops.grouped_gemm_fp8.pytorch.dequantized", dequantized)
    arguments, leaves = with_leaves(call())
    arguments["token_counts"] = torch.tensor([5, 0, 12, 0])
    torch.autograd.grad(moe.grouped_gemm_fp8(**arguments).sum(), leaves)
    assert made == [(200, 300)] * 4


@pytest.mark.parametrize("needed", [["input"], ["topk_weights"], ["input", "topk_weights"]])
def test_gradients_not_needed_are_not_computed(needed):
    arguments, leaves = with_leaves(call(permute_y=True))
    everything = dict(
        zip(
            ("input", "topk_weights"),
            torch.autograd.grad(moe.grouped_gemm_fp8(**arguments).sum(), leaves),
            strict=True,
        )
    )
    for name in everything:
        arguments[name] = arguments[name].detach().requires_grad_(name in needed)
    leaves = [arguments[name] for name in needed]
    found = torch.autograd.grad(moe.grouped_gemm_fp8(**arguments).sum(), leaves)
    for name, gradient in zip(needed, found, strict=True):
        assert torch.equal(gradient, everything[name])


@pytest.mark.parametrize("permute", ["permute_x", "permute_y"])
def test_opcheck(permute):
    flags: dict[str, Any] = {permute: True}
    arguments, _ = with_leaves(call(sizes=(20, 140), **flags))
    with checks.fp8_can_be_compared():
        torch.library.opcheck(moe.grouped_gemm_fp8.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    """Forward and backward are one graph each, for several token counts."""

    def step(arguments: dict[str, Any]) -> Tensor:
        return moe_ops.grouped_gemm_fp8(**arguments).square().sum()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for num_tokens in (3, 12, 5):
        given = call(permute_x=True, num_tokens=num_tokens, sizes=(20, 140))
        results = []
        for function in (step, compiled):
            arguments, leaves = with_leaves(given)
            loss = function(arguments)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for got, want in zip(results[1], results[0], strict=True):
            checks.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_rows_alone(dtype):
    arguments, leaves = with_leaves(call())
    with torch.autocast("cpu", dtype):
        output = moe.grouped_gemm_fp8(**arguments)
    assert output.dtype == dtype
    cast = {**arguments, "input": arguments["input"].to(dtype)}
    assert torch.equal(output, moe.grouped_gemm_fp8(**cast))
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


ADVICE = (
    "a weight in another format is dequantised and given to grouped_gemm, or quantised anew with "
    "moe_ops.quantize_fp8"
)
SCALES = "each block of 128 x 128 weights has one scale that multiplies it, as moe_ops.quantize_fp8"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.int8, torch.uint8, torch.bfloat16, torch.float32], ids=str
)
def test_rejects_a_weight_of_another_format(dtype, requires_grad):
    arguments = call()
    arguments["input"].requires_grad_(requires_grad)
    arguments["weight"] = torch.ones(NUM_EXPERTS, 200, 300).to(dtype)
    got = checks.assert_rejects(TypeError, (), moe.grouped_gemm_fp8, arguments)
    name = str(dtype).removeprefix("torch.")
    assert got == (
        f"moe::grouped_gemm_fp8: expected weight.dtype in (float8_e4m3fn), got {name}; {ADVICE}"
    )


def test_rejects_a_weight_that_does_not_fit():
    """The error gives no advice on formats, because either of the two may be the wrong one."""
    arguments = call()
    arguments["weight"] = torch.zeros(NUM_EXPERTS, 200, 150, dtype=FP8)
    got = checks.assert_rejects(ValueError, (), moe.grouped_gemm_fp8, arguments)
    assert got.endswith("expected weight.shape[2] == input.shape[1] (300), got 150")


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "expected"),
    [
        ((4,), torch.float32, ValueError, "weight_scale.dim() == 3 (num_experts, "),
        ((4, 200), torch.float32, ValueError, "weight_scale.dim() == 3 (num_experts, "),
        ((3, 2, 3), torch.float32, ValueError, "weight_scale.shape[0] == weight.shape[0] (4), got 3"),
        (
            (4, 200, 1), torch.float32, ValueError,
            "weight_scale.shape[1] == (out_features + 127) // 128 (2), got 200",
        ),
        (
            (4, 2, 2), torch.float32, ValueError,
            "weight_scale.shape[2] == (in_features + 127) // 128 (3), got 2",
        ),
        (
            (4, 2, 3), torch.bfloat16, TypeError,
            "weight_scale.dtype in (float32), got bfloat16",
        ),
    ],
)  # fmt: skip
def test_rejects_other_scales(shape, dtype, error, expected):
    arguments = call()
    arguments["weight_scale"] = torch.ones(shape, dtype=dtype)
    texts = (f"moe::grouped_gemm_fp8: expected {expected}", SCALES)
    checks.assert_rejects(error, texts, moe.grouped_gemm_fp8, arguments)


def test_double_backward_and_forward_mode_are_refused():
    arguments, leaves = with_leaves(call())
    output = moe.grouped_gemm_fp8(**arguments)
    tangent = torch.ones_like(output, requires_grad=True)
    (gradient, _) = torch.autograd.grad(output, leaves, tangent, create_graph=True)
    with pytest.raises(NotImplementedError, match="moe::grouped_gemm_fp8_dx: has no gradient"):
        torch.autograd.grad(gradient.sum(), tangent)
    with torch.autograd.forward_ad.dual_level():
        rows = arguments["input"].detach()
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        with pytest.raises(NotImplementedError, match="forward-mode AD is not supported"):
            moe.grouped_gemm_fp8(**{**arguments, "input": dual})


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (3, 200, 300), (2, 3, 1, 129), (2, 0, 5)], ids=str)
def test_quantise_and_back(shape, dtype):
    """A weight is off by at most a sixteenth of it, or by half of the smallest step."""
    weight = torch.randn(shape).to(dtype)
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert (quantised.dtype, quantised.shape) == (FP8, weight.shape)
    *outer, rows, columns = shape
    assert scale.shape == (*outer, -(-rows // 128), -(-columns // 128))
    assert scale.dtype == torch.float32
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float64)
    spread = scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
    spread = spread[..., :rows, :columns]
    limit = torch.maximum(weight.double().abs() / 16, spread * 2**-10) * (1 + 1e-6)
    assert ((back - weight.double()).abs() <= limit).all()
    # The largest weight of each block becomes the largest FP8 number, so no range is wasted.
    for block, of_block in zip(blocks_of(quantised), scale.flatten(), strict=True):
        assert block.double().abs().max() == 448
        assert of_block > 0


def blocks_of(matrices: Tensor) -> list[Tensor]:
    """Yield the blocks of 128 x 128 of all matrices, in the order of their scales."""
    rows, columns = (range(0, size, 128) for size in matrices.shape[-2:])
    flat = matrices.reshape(max(matrices.shape[:-2].numel(), 1), *matrices.shape[-2:])
    if matrices.numel() == 0:
        return []
    return [m[r : r + 128, c : c + 128] for m in flat for r in rows for c in columns]


def test_quantise_by_hand():
    """The largest weight of the first block is 448 / 2, so its scale is a half."""
    weight = torch.zeros(1, 1, 130)
    weight[0, 0, :4] = torch.tensor([224.0, -1.0, 0.53125, 2**-11])
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert scale.tolist() == [[[0.5, 1.0]]]
    # 1.0625 lies between 1 and 1.125 and goes to the even one. 2**-10 goes to zero.
    assert quantised[0, 0, :4].float().tolist() == [448, -2, 1, 0]
    assert not quantised[0, 0, 4:].float().any()
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float32)
    assert back[0, 0, :4].tolist() == [224, -1, 0.5, 0]


def test_quantise_what_is_not_finite_and_what_is_tiny():
    weight = torch.full((256, 128), 1.0)
    weight[0, 0] = float("nan")
    weight[200, 5] = 1e-30
    quantised, scale = moe_ops.quantize_fp8(weight)
    assert quantised[:128].float().isnan().all()
    assert not quantised[128:].float().isnan().any()
    tiny = torch.full((2, 2), 1e-44)
    tiny[0, 0] = 0
    quantised, scale = moe_ops.quantize_fp8(tiny)
    assert scale.item() > 0
    assert not quantised.float().isnan().any()


def test_quantise_takes_what_fp32_does_not_hold():
    """An fp64 weight may be too large for fp32 as long as its scale fits."""
    quantised, scale = moe_ops.quantize_fp8(torch.full((1, 1), 1e39, dtype=torch.float64))
    back = moe_ops.dequantize_fp8(quantised, scale, torch.float64)
    torch.testing.assert_close(back, torch.full_like(back, 1e39), rtol=1e-6, atol=0)


def test_quantise_takes_any_strides():
    weight = torch.randn(2, 300, 200)
    expected = moe_ops.quantize_fp8(weight.transpose(1, 2).contiguous())
    for got, want in zip(moe_ops.quantize_fp8(weight.transpose(1, 2)), expected, strict=True):
        assert torch.equal(got.float(), want.float())
        assert got.is_contiguous()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "expected"),
    [
        ("quantize_fp8", (torch.ones(2, 2).to(FP8),), TypeError, "got float8_e4m3fn"),
        ("quantize_fp8", (torch.ones(2, 2).int(),), TypeError, "got int32"),
        ("quantize_fp8", (torch.ones(2),), ValueError, r"weight.dim\(\) >= 2, got 1 \(2,\)"),
        (
            "dequantize_fp8", (torch.ones(2, 2), torch.ones(1, 1)), TypeError,
            "weight.dtype == float8_e4m3fn, got float32",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1).bfloat16()), TypeError,
            "weight_scale.dtype == float32, got bfloat16",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 200).to(FP8), torch.ones(1, 1)), ValueError,
            r"weight_scale.shape == \(1, 2\), .*, got \(1, 1\)",
        ),
        (
            "dequantize_fp8", (torch.ones(2).to(FP8), torch.ones(1)), ValueError,
            r"weight.dim\(\) >= 2, got 1 \(2,\)",
        ),
        (
            "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1, device="meta")), ValueError,
            r"weight_scale.device == weight.device \(cpu\), got meta",
        ),
        *[
            (
                "dequantize_fp8", (torch.ones(2, 2).to(FP8), torch.ones(1, 1), dtype), TypeError,
                f"dtype in .*, got {name}",
            )
            for dtype, name in ((torch.int8, "int8"), (FP8, "float8_e4m3fn"))
        ],
    ],
)  # fmt: skip
def test_quantise_rejects(function, arguments, error, expected):
    with pytest.raises(error, match=rf"^moe_ops\.{function}: expected .*{expected}$"):
        getattr(moe_ops, function)(*arguments)
