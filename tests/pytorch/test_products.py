# SPDX-License-Identifier: Apache-2.0
"""Rows are multiplied with their experts' matrices in one of three ways, all right.

R rows, E experts, matrices of K x N. The arguments decide the way. The aten ops that were called
show it.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ops._pytorch import products as module
from moe_ops._pytorch.products import Products
from moe_ops.ops.grouped_gemm import pytorch
from testing import checks, oracle
from testing.recorders import CountAten

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bf16"
)
both_orders = pytest.mark.parametrize("transposed", [False, True])
K, N = 24, 16
ONE_CALL, BLOCKS = "_grouped_mm", "bmm"
# The aten op that shows a way, and a number of experts and a dtype that lead to it.
WAYS = {
    "blocks": pytest.param(BLOCKS, 24, torch.bfloat16, marks=needs_bf16),
    "one call": pytest.param(ONE_CALL, 24, torch.float32),
    "one call, few experts": pytest.param(ONE_CALL, 3, torch.bfloat16, marks=needs_bf16),
    "loop": pytest.param("mm", 24, torch.float64),
    "loop, few experts": pytest.param("mm", 3, torch.float64),
}
ways = pytest.mark.parametrize(("way", "num_experts", "dtype"), WAYS.values(), ids=WAYS)
# The rows of each expert, repeated for as many experts as there are, and the rows of no expert.
COUNTS = {
    "equal": ([4], 0),
    "uneven": ([5, 3, 6, 4, 2, 6], 0),
    "dropped": ([5, 3, 6, 4, 2, 6], 7),
    "one row dropped": ([5, 3, 6, 4, 2, 6], 1),
    "empty": ([5, 3, 6, 4, 2, 0], 0),
    "empty and dropped": ([0, 5, 3, 6, 4, 2], 9),
}
# Here one expert has more rows than a block: the first or the last.
LARGER = {"hot": 0, "hot last": -1}


def counts_of(name: str, num_experts: int) -> tuple[list[int], int]:
    """Return the rows of each expert, and R."""
    if name in LARGER:
        counts = [4] * num_experts
        counts[LARGER[name]] = 61
        dropped = 3
    else:
        few, dropped = COUNTS[name]
        counts = [*itertools.islice(itertools.cycle(few), num_experts)]
    return counts, sum(counts) + dropped


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, transposed: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.mT.contiguous().mT if transposed else values


def products_of(counts: list[int], num_rows: int) -> Products:
    return Products(torch.tensor(counts, dtype=torch.int32), num_rows)


def experts_rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, count in enumerate(counts):
        yield e, slice(start, start + count)
        start += count


def expected_product(
    rows: Tensor, matrices: Tensor, counts: list[int], bias: Tensor | None = None
) -> Tensor:
    output = torch.zeros(len(rows), matrices.shape[2], dtype=torch.float64)
    for e, own in experts_rows(counts):
        output[own] = rows[own].double() @ matrices[e].double()
        if bias is not None:
            output[own] += bias[e].double()
    return output


def expected_sum(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    return torch.stack(
        [left[own].double().t() @ right[own].double() for _, own in experts_rows(counts)]
    )


def assert_took(aten: CountAten, way: str) -> None:
    assert aten.calls[way]
    others = {ONE_CALL, BLOCKS, "mm"} - {way}
    # The rows beyond the blocks are multiplied alone.
    assert not sum(aten.calls[other] for other in others - ({"mm"} if way == BLOCKS else set()))


@ways
@both_orders
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("name", [*COUNTS, *LARGER])
def test_multiply(name, gathered, transposed, way, num_experts, dtype):
    counts, num_rows = counts_of(name, num_experts)
    matrices = randn(num_experts, K, N, dtype=dtype, seed=1, transposed=transposed)
    given = randn(num_rows // 2 + 1 if gathered else num_rows, K, dtype=dtype)
    sources = torch.arange(num_rows).flip(0) // 2 if gathered else None
    rows = given if sources is None else given[sources]
    with checks.poisoned_memory():
        with CountAten() as aten:
            output = products_of(counts, num_rows).multiply(given, matrices, sources=sources)
        again = products_of(counts, num_rows).multiply(given, matrices, sources=sources)
    assert_took(aten, way)
    assert output.dtype == dtype
    checks.assert_close(output, expected_product(rows, matrices, counts))
    assert not output[sum(counts) :].any()
    assert torch.equal(again, output)
    if name in LARGER and way == BLOCKS:
        assert aten.calls["mm"] == 1


@ways
@both_orders
@pytest.mark.parametrize("name", [*COUNTS, *LARGER])
def test_multiply_transposed(name, transposed, way, num_experts, dtype):
    counts, num_rows = counts_of(name, num_experts)
    left = randn(num_rows, K, dtype=dtype, transposed=transposed)
    right = randn(num_rows, N, dtype=dtype, seed=1)
    if transposed and way == ONE_CALL and num_rows * dtype.itemsize % 16:
        way = "mm"
    if transposed and way == BLOCKS and num_rows * dtype.itemsize % 16:
        way = "mm"
    with checks.poisoned_memory():
        with CountAten() as aten:
            output = products_of(counts, num_rows).multiply_transposed(left, right, dtype)
        again = products_of(counts, num_rows).multiply_transposed(left, right, dtype)
    assert_took(aten, way)
    checks.assert_close(output, expected_sum(left, right, counts))
    assert not output[[count == 0 for count in counts]].any()
    assert torch.equal(again, output)


@ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["uneven", "dropped", *LARGER])
def test_no_expert_sees_the_rows_of_another(name, bad, way, num_experts, dtype):
    counts, num_rows = counts_of(name, num_experts)
    matrices = randn(num_experts, K, N, dtype=dtype, seed=1)
    products = products_of(counts, num_rows)
    left, right = randn(num_rows, K, dtype=dtype), randn(num_rows, N, dtype=dtype, seed=2)
    clean = products.multiply(left, matrices)
    clean_sum = products.multiply_transposed(left, right, dtype)
    dropped = slice(sum(counts), num_rows)
    for e, own in [*experts_rows(counts), (num_experts, dropped)]:
        if own.start == own.stop:
            continue
        bad_left, bad_right = left.clone(), right.clone()
        bad_left[own], bad_right[own] = bad, bad
        with CountAten() as aten:
            output = products.multiply(bad_left, matrices)
            sums = products.multiply_transposed(bad_left, bad_right, dtype)
        assert_took(aten, way)
        others = [row for row in range(num_rows) if not own.start <= row < own.stop]
        assert torch.equal(output[others], clean[others])
        experts_left = [i for i in range(num_experts) if i != e]
        assert torch.equal(sums[experts_left], clean_sum[experts_left])
        if e < num_experts:
            assert not sums[e].isfinite().any()
            assert not output[own].isfinite().any()


@ways
@pytest.mark.parametrize("first", [-3, 9, 2**30])
def test_corrupt_counts_stay_in_bounds(first, way, num_experts, dtype):
    counts = [first] * (num_experts // 2) + [4] * (num_experts - num_experts // 2)
    num_rows = 4 * num_experts
    left, right = randn(num_rows, K, dtype=dtype), randn(num_rows, N, dtype=dtype)
    products = products_of(counts, num_rows)
    assert products.ends == sorted(products.ends)
    assert 0 <= products.ends[0] <= products.tail <= num_rows
    matrices = randn(num_experts, K, N, dtype=dtype)
    assert products.multiply(left, matrices).shape == (num_rows, N)
    assert products.multiply_transposed(left, right, dtype).shape == (num_experts, K, N)


@ways
def test_rows_of_any_stride(way, num_experts, dtype):
    """They may have strides that functional.grouped_mm refuses."""
    counts, num_rows = counts_of("dropped", num_experts)
    matrices = randn(num_experts, K, N, dtype=dtype)
    wide = randn(num_rows, K + 8, dtype=dtype)
    products = products_of(counts, num_rows)
    strided = [
        wide[:, 8:], wide[:, 1 : K + 1], randn(num_rows, K + 1, dtype=dtype)[:, :K],
        randn(K, num_rows + 7, dtype=dtype).t()[:num_rows], randn(num_rows, 2 * K, dtype=dtype)[:, ::2],
        randn(1, K, dtype=dtype).expand(num_rows, K), randn(num_rows, 1, dtype=dtype).expand(-1, K),
    ]  # fmt: skip
    right = randn(num_rows, N, dtype=dtype, seed=1)
    for left in strided:
        found = products.multiply(left, matrices)
        checks.assert_close(found, expected_product(left, matrices, counts))
        for pair in ((left, right), (right, left)):
            found = products.multiply_transposed(*pair, dtype)
            checks.assert_close(found, expected_sum(*pair, counts))
    for any_matrices in (
        randn(num_experts, K, N + 1, dtype=dtype)[..., :N], randn(num_experts, K, 2 * N, dtype=dtype)[..., ::2],
        randn(K, N, dtype=dtype).expand(num_experts, K, N), randn(K, num_experts, N, dtype=dtype).transpose(0, 1),
    ):  # fmt: skip
        found = products.multiply(wide[:, :K], any_matrices)
        checks.assert_close(found, expected_product(wide[:, :K], any_matrices, counts))


@ways
def test_gathered_rows_of_any_stride(way, num_experts, dtype):
    """Gathered, they are dense: their strides say nothing of what is multiplied."""
    counts, num_rows = counts_of("dropped", num_experts)
    products = products_of(counts, num_rows)
    sources = torch.arange(num_rows).flip(0)
    for pitch, width in ((K, K - 1), (K + 1, K), (2 * K, K)):
        given = randn(num_rows, pitch, dtype=dtype)[:, :width]
        matrices = randn(num_experts, width, N, dtype=dtype)
        found = products.multiply(given, matrices, sources=sources)
        checks.assert_close(found, expected_product(given[sources], matrices, counts))


@pytest.mark.parametrize("sizes", [(20, 16), (24, 12), (1, 8), (8, 1), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_that_grouped_mm_refuses_or_pads(dtype, sizes):
    k, n = sizes
    counts, num_rows = counts_of("dropped", 6)
    products = products_of(counts, num_rows)
    left, right = randn(num_rows, k, dtype=dtype), randn(num_rows, n, dtype=dtype, seed=1)
    for transposed in (False, True):
        matrices = randn(6, k, n, dtype=dtype, transposed=transposed)
        found = products.multiply(left, matrices)
        checks.assert_close(found, expected_product(left, matrices, counts))
        assert found.is_contiguous()
    found = products.multiply_transposed(left, right, dtype)
    checks.assert_close(found, expected_sum(left, right, counts))
    assert found.is_contiguous()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_biases_and_results_of_another_dtype(dtype, gathered, wide):
    """The biases have any strides."""
    counts, num_rows = counts_of("empty and dropped", 24)
    given = randn(num_rows // 2 + 1 if gathered else num_rows, K, dtype=dtype)
    sources = torch.arange(num_rows) // 2 if gathered else None
    rows = given if sources is None else given[sources]
    matrices = randn(24, K, N, dtype=dtype, seed=1)
    result = torch.promote_types(dtype, torch.float32) if wide else dtype
    contiguous = randn(24, N, dtype=dtype, seed=2)
    for bias in (None, contiguous, contiguous.t().contiguous().t()):
        with checks.poisoned_memory():
            found = products_of(counts, num_rows).multiply(
                given, matrices, bias, sources=sources, dtype=result
            )
        assert found.dtype == result
        checks.assert_close(found, expected_product(rows, matrices, counts, bias))


def test_a_result_of_another_dtype_is_not_rounded_before():
    """bf16 rows times bf16 matrices give fp32 results that are as precise as fp32."""
    counts, num_rows = counts_of("uneven", 6)
    rows, matrices = randn(num_rows, K, dtype=torch.bfloat16), randn(6, K, N, dtype=torch.bfloat16)
    products = products_of(counts, num_rows)
    found = products.multiply(rows, matrices, dtype=torch.float32)
    checks.assert_close(found, expected_product(rows, matrices, counts), dtype=torch.float32)
    right = randn(num_rows, N, dtype=torch.bfloat16)
    found = products.multiply_transposed(rows, right, torch.float32)
    checks.assert_close(found, expected_sum(rows, right, counts), dtype=torch.float32)
    # Wide rows are not rounded before they are multiplied with narrow ones.
    fine = randn(num_rows, K, dtype=torch.float32)
    found = products.multiply_transposed(fine, right, torch.bfloat16)
    expected = expected_sum(fine, right, counts).bfloat16()
    assert (found != expected).sum() <= expected.numel() // 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_instructions_for_a_dtype_products_are_taken_in_fp32(dtype):
    onednn = torch.ops.mkldnn
    is_native = {
        torch.bfloat16: onednn._is_mkldnn_bf16_supported,
        torch.float16: onednn._is_mkldnn_fp16_supported,
    }[dtype]()
    counts, num_rows = counts_of("uneven", 3)
    products = products_of(counts, num_rows)
    with CountAten() as aten:
        products.multiply(randn(num_rows, K, dtype=dtype), randn(3, K, N, dtype=dtype))
        products.multiply_transposed(
            randn(num_rows, K, dtype=dtype), randn(num_rows, N, dtype=dtype), dtype
        )
    multiplied = [*aten.given.get("mm", ()), *aten.given.get(ONE_CALL, ())]
    dtypes = {tensor.dtype for tensors in multiplied for tensor in tensors[:2]}
    assert dtypes == {dtype if is_native else torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_the_cpu_multiplies_says_nothing_about_other_devices(dtype, monkeypatch):
    monkeypatch.setattr(module, "_multiplies_in", lambda dtype: torch.float32)
    counts, num_rows = counts_of("uneven", 3)
    rows = torch.empty(num_rows, K, dtype=dtype, device="meta")
    with CountAten() as aten:
        products_of(counts, num_rows).multiply(rows, rows.new_empty(3, K, N))
    assert {tensor.dtype for tensors in aten.given["mm"] for tensor in tensors[:2]} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_and_experts_of_rows(dtype):
    counts, num_rows = counts_of("empty and dropped", 6)
    products = products_of(counts, num_rows)
    rows = randn(num_rows, N, dtype=dtype)
    rows[sum(counts) :] = float("nan")
    sums = products.sum_by_expert(rows, dtype)
    assert sums.dtype == dtype
    expected = torch.stack([rows[own].double().sum(0) for _, own in experts_rows(counts)])
    checks.assert_close(sums, expected)
    assert not sums[0].any()
    of_rows = products.experts_of_rows(rows.device).tolist()
    assert of_rows == [e for e, own in experts_rows(counts) for _ in range(own.start, own.stop)]


def block_size(
    counts: list[int], sums: bool, k: int = 256, n: int = 256, dropped: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> int:  # fmt: skip
    """Return the rows of each expert's block, or 0 if there are no blocks."""
    num_rows = sum(counts) + dropped
    products = products_of(counts, num_rows)
    with CountAten() as aten:
        rows = torch.zeros(num_rows, k, dtype=dtype)
        if sums:
            products.multiply_transposed(rows, torch.zeros(num_rows, n, dtype=dtype), dtype)
        else:
            matrix = torch.zeros(k, n, dtype=dtype)
            products.multiply(rows, matrix.expand(len(counts), k, n))
    assert aten.calls[BLOCKS] <= 1
    if not aten.calls[BLOCKS]:
        return 0
    [[left, _]] = aten.given[BLOCKS]
    return left.shape[2 if sums else 1]


@ways
def test_the_default_device_is_not_asked(way, num_experts, dtype):
    counts, num_rows = counts_of("hot", num_experts)
    left, right = randn(num_rows, K, dtype=dtype), randn(num_rows, N, dtype=dtype)
    matrices = randn(num_experts, K, N, dtype=dtype)
    products = products_of(counts, num_rows)
    with torch.device("meta"), CountAten() as aten:
        output = products.multiply(left, matrices)
        sums = products.multiply_transposed(left, right, dtype)
        of_rows = products.experts_of_rows(left.device)
    assert_took(aten, way)
    assert output.is_cpu
    assert sums.is_cpu
    assert of_rows.is_cpu


@needs_bf16
@pytest.mark.parametrize("sums", [False, True])
def test_when_there_are_blocks(sums):
    def size(*args, **kwargs):
        return block_size(args[0], sums, *args[1:], **kwargs)

    assert size([16] * 64) == 16
    assert size([15, 17] * 32) == 17
    # The other rows of the large expert are a product of their own.
    assert size([16] * 63 + [300]) == 16
    assert size([16] * 64, dropped=176) == 16
    # Products are large, experts are few, few of many have most rows, or there is nothing.
    assert size([128] * 8, 1024, 1024) == 0
    assert size([128] * 2) == 0
    assert size([500] * 6 + [1] * 20) == 0
    assert size([0] * 64, dropped=1024) == 0
    # In decoding it counts how many experts' matrices are read.
    assert size([2, 1] * 32, 2048, 1024) == 2
    assert size([2, 1, 0, 1] * 16, 2048, 1024) == 0
    assert size([0] * 64) == 0
    # In fp32 there is too little around a product to save.
    assert size([16] * 64, 128, 128, dtype=torch.float32) == 0


@needs_bf16
def test_blocks_are_not_more_than_twice_the_rows():
    draw = random.Random(0)
    taken = 0
    for _ in range(100):
        num_experts = draw.choice((8, 16, 64, 128))
        counts = [int(draw.expovariate(1 / draw.choice((1, 8, 40)))) for _ in range(num_experts)]
        dropped = draw.choice((0, 0, 17))
        size = block_size(counts, draw.random() < 0.5, 16, 16, dropped)
        assert size * num_experts <= 2 * (sum(counts) + dropped)
        taken += bool(size)
    assert taken > 20


@needs_bf16
def test_blocks_have_few_sizes():
    """oneDNN compiles a product for each size."""
    sizes = {count: block_size([count] * 8, False, 8, 8) for count in range(1, 1000, 9)}
    for count, size in sizes.items():
        assert count <= size < count * 17 / 16
    assert len(set(sizes.values())) <= 60


FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "permute_x": {"permute_x": True},
    "permute_y": {"permute_y": True},
    "weighted": {"topk_weights": True, "bias": True},
    "weighted permute_x": {"topk_weights": True, "bias": True, "permute_x": True},
    "weighted permute_y": {"topk_weights": True, "permute_y": True},
    "bias": {"bias": True},
}


@ways
@both_orders
@pytest.mark.parametrize("flags", FLAGS)
def test_grouped_gemm_takes_each_way(flags, transposed, way, num_experts, dtype):
    """Samples drawn from the schema are too small for most of the ways."""
    generator = torch.Generator().manual_seed(0)
    top_k, num_tokens = 2, 2 * num_experts
    # Some slots are dropped. The first expert has few rows and the second none.
    ids = torch.randint(2, num_experts, (num_tokens, top_k), generator=generator)
    ids.view(-1)[:2] = 0
    ids.view(-1)[5:9] = -1
    token_counts, gather_indices, _ = oracle.routing_indices(ids, num_experts)
    given = FLAGS[flags]
    permute_x = given.get("permute_x", False)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    arguments: dict[str, Any] = {
        "input": randn(num_tokens if permute_x else num_tokens * top_k, K, dtype=dtype),
        "weight": randn(num_experts, N, K, dtype=dtype, seed=1, transposed=transposed),
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": weights if "topk_weights" in given else None,
        "bias": randn(num_experts, N, dtype=dtype, seed=2) if "bias" in given else None,
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": given.get("permute_y", False),
    }
    with CountAten() as aten:
        pytorch.grouped_gemm(**arguments)
    if not {"topk_weights", "bias"} & set(given):
        assert aten.calls[way]
    leaves = ["input", "weight", "topk_weights", "bias"]
    leaves = [name for name in leaves if arguments[name] is not None]
    traced = {
        name: value.detach().requires_grad_() if name in leaves else value
        for name, value in arguments.items()
    }
    with checks.poisoned_memory():
        output = torch.ops.moe.grouped_gemm(**traced)
        grad_output = randn(*output.shape, dtype=dtype, seed=3)
        found = torch.autograd.grad(output, [traced[name] for name in leaves], grad_output)
    checks.assert_close(output, oracle.grouped_gemm(**arguments))
    expected = oracle.gradients(oracle.grouped_gemm, arguments, leaves, grad_output)
    for name, got in zip(leaves, found, strict=True):
        worse = checks.coarser(got.dtype, dtype)
        checks.assert_close(got, expected[name], dtype=worse, what=f"gradient of {name}")


@pytest.mark.parametrize(
    "sizes", [(2, 8, 16, 0), (0, 8, 16, 0), (2, 8, 0, 4), (2, 0, 16, 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_multiply(sizes, dtype):
    num_experts, n, d, rows = sizes
    counts = [rows // num_experts] * num_experts if num_experts else []
    x, weight = torch.randn(rows, d).to(dtype), torch.randn(num_experts, n, d).to(dtype)
    # The gradient of a sum is expanded, with strides 0.
    dy = torch.ones((), dtype=dtype).expand(rows, n)
    leaves = x.requires_grad_(), weight.requires_grad_()
    output = torch.ops.moe.grouped_gemm(*leaves, torch.tensor(counts, dtype=torch.int32))
    grads = torch.autograd.grad(output, leaves, dy)
    assert output.shape == (rows, n)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    assert not output.any()


@needs_bf16
@pytest.mark.parametrize("weights_before", [False, True])
def test_the_whole_layer_of_experts(weights_before):
    """With many small experts each product is one of blocks."""
    num_experts, top_k, num_tokens = 24, 2, 40
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    ids[:20, 0] = 3
    arguments: dict[str, Any] = {
        "hidden_states": randn(num_tokens, K, dtype=torch.bfloat16),
        "gate_up_proj": randn(num_experts, 2 * N, K, dtype=torch.bfloat16, seed=1),
        "down_proj": randn(num_experts, K, N, dtype=torch.bfloat16, seed=2),
        "topk_ids": ids,
        "topk_weights": randn(num_tokens, top_k, dtype=torch.float32, seed=3),
        "weights_before": weights_before,
    }
    names = ["hidden_states", "gate_up_proj", "down_proj", "topk_weights"]
    grad_output = randn(num_tokens, K, dtype=torch.bfloat16, seed=4)
    expected = oracle.gradients(oracle.fused_experts, arguments, names, grad_output)
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    with checks.poisoned_memory():
        output = torch.ops.moe.fused_experts(**{**arguments, **leaves})
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    checks.assert_close(output, oracle.fused_experts(**arguments))
    for name, grad in zip(names, grads, strict=True):
        checks.assert_close(grad, expected[name], dtype=torch.bfloat16, what=name)
