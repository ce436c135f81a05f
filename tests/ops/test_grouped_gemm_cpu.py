# SPDX-License-Identifier: Apache-2.0
"""The ways in which the CPU implementation of grouped_gemm multiplies, each taken and compared.

Samples drawn from the schemas are too small for most of them.
"""

import pytest
import torch

from moe_ops._pytorch import batched_gemm
from moe_ops.ops.grouped_gemm import pytorch
from testing import checks, oracle

NUM_EXPERTS, TOP_K = 3, 2

FLAGS = {
    "plain": {},
    "permute_x": {"permute_x": True},
    "permute_y": {"permute_y": True},
    "weighted": {"topk_weights": True, "bias": True},
    "weighted_permute_x": {"topk_weights": True, "bias": True, "permute_x": True},
    "bias": {"bias": True},
}


def make_arguments(dtype, flags, num_tokens, in_features, out_features, transposed, seed=0):
    """Arguments with dropped slots, an expert that has few rows and one that has none."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    num_rows = num_tokens * TOP_K
    ids = torch.full((num_rows,), 2)
    ids[:5] = 0
    ids[5:12] = -1
    order = torch.randperm(num_rows, generator=generator)
    topk_ids = ids[order].reshape(num_tokens, TOP_K)
    token_counts, gather_indices, _ = oracle.routing_indices(topk_ids, NUM_EXPERTS)
    permute_x, permute_y = flags.get("permute_x", False), flags.get("permute_y", False)
    weight = randn(NUM_EXPERTS, out_features, in_features)
    if transposed:
        weight = weight.mT.contiguous().mT
    return {
        "input": randn(num_tokens if permute_x else num_rows, in_features),
        "weight": weight,
        "token_counts": token_counts,
        "gather_indices": gather_indices,
        "topk_weights": (
            torch.rand(num_tokens, TOP_K, generator=generator) if "topk_weights" in flags else None
        ),
        "bias": randn(NUM_EXPERTS, out_features) if "bias" in flags else None,
        "top_k": TOP_K,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }


def assert_matches_oracle(arguments):
    generator = torch.Generator().manual_seed(1)
    leaves = ["input", "weight", "topk_weights", "bias"]
    leaves = [name for name in leaves if arguments[name] is not None]
    given = {
        name: value.detach().requires_grad_() if name in leaves else value
        for name, value in arguments.items()
    }
    dtype = arguments["input"].dtype
    with checks.poisoned_memory():
        output = torch.ops.moe.grouped_gemm(**given)
        grad_output = torch.randn(output.shape, generator=generator).to(dtype)
        found = torch.autograd.grad(output, [given[name] for name in leaves], grad_output)
    checks.assert_close(output, oracle.grouped_gemm(**arguments))
    expected = oracle.gradients(oracle.grouped_gemm, arguments, leaves, grad_output)
    for name, got in zip(leaves, found, strict=True):
        checks.assert_close(
            got, expected[name], dtype=checks.coarser(got.dtype, dtype), what=f"gradient of {name}"
        )


@pytest.fixture(autouse=True)
def _forgotten():
    """What a test changes, what was remembered before would not see."""
    pytorch._grouped_mm_of.cache_clear()
    yield
    pytorch._grouped_mm_of.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """How often each way was taken."""
    counted = {"grouped_mm": 0, "blocks": 0}
    grouped_mm, product = pytorch._torch_grouped_mm, pytorch._product

    def counting_grouped_mm(*args, **kwargs):
        counted["grouped_mm"] += 1
        return grouped_mm(*args, **kwargs)

    def counting_product(*args):
        counted["blocks"] += 1
        return product(*args)

    monkeypatch.setattr(pytorch, "_torch_grouped_mm", counting_grouped_mm)
    monkeypatch.setattr(pytorch, "_product", counting_product)
    return counted


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_few_sizes(dtype, flags, transposed, calls, monkeypatch):
    monkeypatch.setattr(pytorch, "_grouped_mm_is_best", lambda *_: False)
    # 67 rows of expert 2 in 68, of which the last would be past the end: it begins before.
    arguments = make_arguments(dtype, FLAGS[flags], 40, 24, 16, transposed)
    counts = arguments["token_counts"].tolist()
    assert counts == [5, 0, 68]
    arguments["token_counts"] = torch.tensor([5, 0, 67], dtype=torch.int32)
    assert batched_gemm.few_sizes(67) == 68
    assert_matches_oracle(arguments)
    assert calls["grouped_mm"] == 0
    assert calls["blocks"] > 0
    arguments["token_counts"] = torch.tensor([0, 5, 75], dtype=torch.int32)
    assert batched_gemm.few_sizes(75) + 5 > 80
    assert_matches_oracle(arguments)


@pytest.fixture
def onednn(monkeypatch):
    """fp32 products of any size are oneDNN's, as on CPUs where it is the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(pytorch, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(pytorch, "_LARGE_FP32", 0)
    monkeypatch.setattr(pytorch, "_LARGE_FP32_SUMS", 0)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("flags", ["plain", "bias", "weighted_permute_x"])
def test_products_of_onednn(flags, monkeypatch):
    linear = torch.ops.mkldnn._linear_pointwise
    taken = []

    def counting_linear(*args):
        taken.append(args)
        return linear(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting_linear)
    assert_matches_oracle(make_arguments(torch.float32, FLAGS[flags], 75, 128, 136, False))
    assert len(taken) == 3  # forward, dX, dW


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_of_any_strides(dtype):
    """At a size of which oneDNN's product takes the bias."""
    x, weight = torch.randn(300, 128).to(dtype), torch.randn(2, 128, 128).to(dtype)
    bias = torch.randn(128, 2).to(dtype).t()
    counts = torch.tensor([200, 100], dtype=torch.int32)
    output = torch.ops.moe.grouped_gemm(x, weight, counts, bias=bias)
    assert torch.equal(
        output,
        torch.ops.moe.grouped_gemm(
            x, weight, counts, bias=bias.clone(memory_format=torch.contiguous_format)
        ),
    )


@pytest.mark.parametrize("is_best", [False, True], ids=["blocks", "grouped_mm"])
def test_neighbours_may_be_nan(is_best, monkeypatch):
    monkeypatch.setattr(pytorch, "_grouped_mm_is_best", lambda *_: is_best)
    counts = torch.tensor([33, 33], dtype=torch.int32)
    assert batched_gemm.few_sizes(33) > 33
    x, weight = torch.randn(70, 16, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    with torch.no_grad():
        x[33:] = float("nan")
    output = torch.ops.moe.grouped_gemm(x, weight, counts)
    grad_output = torch.randn(70, 8)
    grad_output[66:] = float("nan")
    grad_x, grad_weight = torch.autograd.grad(output, (x, weight), grad_output)
    assert output[:33].isfinite().all()
    assert output[33:66].isnan().all()
    assert (output[66:] == 0).all()
    assert grad_weight[0].isfinite().all()
    assert grad_x[:66].isfinite().all()
    assert (grad_x[66:] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flags", ["plain", "permute_x"])
def test_small_products_in_one_call(flags, transposed, calls):
    assert_matches_oracle(make_arguments(torch.float32, FLAGS[flags], 40, 24, 16, transposed))
    # dX sums the slots of a token expert by expert.
    assert calls["grouped_mm"] == 3 - (flags == "permute_x")


def test_sizes_that_grouped_mm_refuses(calls):
    assert_matches_oracle(make_arguments(torch.float32, {}, 40, 20, 16, False))
    sliced = make_arguments(torch.float32, {}, 40, 24, 16, False)
    sliced["input"] = torch.randn(80, 25)[:, :24]
    assert_matches_oracle(sliced)
    assert calls["grouped_mm"] == 1  # dX of the second: neither dY nor the weight is sliced


def run(x, weight, counts, grad_output):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    output = torch.ops.moe.grouped_gemm(x, weight, torch.tensor(counts, dtype=torch.int32))
    return output, *torch.autograd.grad(output, (x, weight), grad_output)


def test_one_row_of_any_stride():
    """torch calls a single row contiguous, whatever its stride."""
    x, weight, dy = torch.randn(5, 17)[:1, :16], torch.randn(2, 8, 16), torch.randn(3, 9)[:1, :8]
    output, dx, dw = run(x, weight, [1, 0], dy)
    torch.testing.assert_close(output, x @ weight[0].t())
    torch.testing.assert_close(dx, dy @ weight[0])
    torch.testing.assert_close(dw, torch.stack([dy.t() @ x, torch.zeros(8, 16)]))


@pytest.mark.parametrize(
    "sizes", [(2, 8, 16, 0), (0, 8, 16, 0), (2, 8, 0, 4), (2, 0, 16, 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_multiply(sizes, dtype):
    num_experts, n, d, rows = sizes
    counts = [rows // num_experts] * num_experts if num_experts else []
    x, weight = torch.randn(rows, d).to(dtype), torch.randn(num_experts, n, d).to(dtype)
    # The gradient of a sum: expanded, its strides 0.
    output, dx, dw = run(x, weight, counts, torch.ones((), dtype=dtype).expand(rows, n))
    assert output.shape == (rows, n)
    assert dx.shape == x.shape
    assert dw.shape == weight.shape
    assert not output.any()
    assert not dx.any()
    assert not dw.any()


def test_few_sizes():
    for count in range(1, 5000):
        assert count <= batched_gemm.few_sizes(count) < count * 17 / 16
    assert len({batched_gemm.few_sizes(count) for count in range(1, 5000)}) < 150
