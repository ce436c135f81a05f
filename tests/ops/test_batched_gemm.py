# SPDX-License-Identifier: Apache-2.0
"""Small experts in one torch.bmm: that it is taken, and that no expert sees another's rows.

E experts, D in_features, N out_features, R rows.
"""

import itertools
import random

import pytest
import torch

from moe_ops._pytorch import batched_gemm
from moe_ops._pytorch.rows import expert_ends
from moe_ops.ops.grouped_gemm import pytorch
from testing import checks, oracle

D, N = 24, 16
# The rows of each expert, and how many rows there are.
COUNTS = {
    "equal": ([4] * 6, 24),
    "uneven": ([5, 3, 6, 4, 2, 6], 26),
    "dropped": ([5, 3, 6, 4, 2, 6], 33),
    "empty": ([0, 5, 0, 0, 6, 0], 11),
    "empty_and_dropped": ([0, 5, 0, 0, 6, 0], 20),
    "hot": ([1, 2, 30, 0, 3, 1], 37),
    "hot_last": ([1, 2, 1, 0, 3, 30], 40),
    "one": ([0, 0, 12, 0, 0, 0], 12),
    "none": ([0] * 6, 9),
}
SIZES = (1, 4, 6, 9)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def sizes(monkeypatch):
    """Every product is a batch of `sizes["size"]` rows; `sizes["taken"]` counts them."""
    state = {"size": 0, "taken": 0}
    bmm = torch.bmm

    def counting_bmm(*args, **kwargs):
        state["taken"] += 1
        return bmm(*args, **kwargs)

    monkeypatch.setattr(pytorch, "may_batch", lambda *_, **__: True)
    monkeypatch.setattr(pytorch, "batch_size", lambda *_, **__: state["size"])
    monkeypatch.setattr(torch, "bmm", counting_bmm)
    monkeypatch.setattr(pytorch, "_is_native", lambda _: True)
    # What depends on either is remembered.
    remembered = pytorch._grouped_mm_of, pytorch._batch_size
    for function in remembered:
        function.cache_clear()
    yield state
    for function in remembered:
        function.cache_clear()


def make_operands(num_rows, dtype, transposed=False, num_experts=6):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    weight = randn(num_experts, N, D)
    if transposed:
        weight = weight.mT.contiguous().mT
    return randn(num_rows, D).requires_grad_(), weight.requires_grad_(), randn(num_rows, N)


def run(x, weight, counts, grad_output):
    output = torch.ops.moe.grouped_gemm(x, weight, torch.tensor(counts, dtype=torch.int32))
    return output, *torch.autograd.grad(output, (x, weight), grad_output)


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_matches_the_oracle(name, transposed, size, dtype, sizes):
    counts, num_rows = COUNTS[name]
    sizes["size"] = size
    x, weight, grad_output = make_operands(num_rows, dtype, transposed)
    with checks.poisoned_memory():
        output, dx, dw = run(x, weight, counts, grad_output)
    assert sizes["taken"] == 3
    arguments = {"input": x.detach(), "weight": weight.detach()}
    arguments["token_counts"] = torch.tensor(counts, dtype=torch.int32)
    checks.assert_close(output, oracle.grouped_gemm(**arguments))
    expected = oracle.gradients(oracle.grouped_gemm, arguments, ["input", "weight"], grad_output)
    checks.assert_close(dx, expected["input"], what="dX")
    checks.assert_close(dw, expected["weight"], what="dW")
    tail = sum(counts)
    assert not output[tail:].any()
    assert not dx[tail:].any()
    assert not dw[[count == 0 for count in counts]].any()
    again = run(x, weight, counts, grad_output)
    assert all(map(torch.equal, again, (output, dx, dw)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["uneven", "dropped", "hot", "hot_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_expert_sees_the_rows_of_another(dtype, name, size, bad, sizes):
    counts, num_rows = COUNTS[name]
    sizes["size"] = size
    x, weight, grad_output = make_operands(num_rows, dtype)
    clean = run(x, weight, counts, grad_output)
    ends = torch.tensor(counts).cumsum(0).tolist()
    experts = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
    for e, (start, end) in enumerate([*experts, (ends[-1], num_rows)]):
        if start == end:
            continue
        poisoned, poisoned_grad = x.detach().clone(), grad_output.clone()
        poisoned[start:end] = bad
        poisoned_grad[start:end] = bad
        output, dx, dw = run(poisoned.requires_grad_(), weight, counts, poisoned_grad)
        others = [row for row in range(num_rows) if not start <= row < end]
        for found, expected in ((output, clean[0]), (dx, clean[1])):
            assert torch.equal(found[others], expected[others])
        experts_left = [i for i in range(len(counts)) if i != e]
        assert torch.equal(dw[experts_left], clean[2][experts_left])
        if e < len(counts):
            assert not dw[e].isfinite().any()


@pytest.mark.parametrize("counts", [[-3, 5, 2, 0, 1, 1], [9, 9, 9, 9, 9, 9], [2**30] * 6], ids=str)
def test_corrupt_counts_stay_in_bounds(counts, sizes):
    sizes["size"] = 4
    x, weight, grad_output = make_operands(20, torch.float32)
    output, dx, dw = run(x, weight, counts, grad_output)
    assert sizes["taken"] == 3
    assert (output.shape, dx.shape, dw.shape) == ((20, N), x.shape, weight.shape)


def test_rows_of_any_stride(sizes):
    sizes["size"] = 6
    counts, num_rows = COUNTS["dropped"]
    x, weight, grad_output = make_operands(num_rows, torch.float32)
    expected = run(x, weight, counts, grad_output)
    wide = torch.randn(num_rows, D + 8)
    wide[:, 8:] = x.detach()
    columns = torch.randn(N, num_rows + 7).t()[:num_rows]
    columns.copy_(grad_output)
    assert sizes["taken"] == 3
    found = run(wide[:, 8:].requires_grad_(), weight, counts, columns)
    assert sizes["taken"] == 6
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def size_of(counts, sums_rows, sizes=(256, 256), dtype=torch.bfloat16, num_rows=None):
    num_rows = sum(counts) if num_rows is None else num_rows
    ends = expert_ends(torch.tensor(counts, dtype=torch.int32), num_rows)
    size = batched_gemm.batch_size(ends, sizes, dtype, sums_rows=sums_rows)
    may = batched_gemm.may_batch(len(counts), num_rows, sizes, dtype, sums_rows=sums_rows)
    assert may or not size
    return size


@pytest.mark.parametrize("sums_rows", [False, True])
def test_when_it_is_taken(sums_rows):
    def size(*args, **kwargs):
        return size_of(args[0], sums_rows, *args[1:], **kwargs)

    assert size([16] * 64) == 16
    assert size([15, 17] * 32) == 17
    # The large expert's other rows are a product of their own.
    assert size([16] * 63 + [300]) == 16
    assert size([16] * 64, num_rows=1200) == 16
    # Large products, few experts, most rows with few of many, nothing.
    assert size([1024] * 64, (1024, 1024)) == 0
    assert size([128] * 2) == 0
    assert size([500] * 6 + [1] * 20) == 0
    assert size([0] * 64, num_rows=1024) == 0
    # Decoding: what counts is the experts whose matrices are read.
    assert size([2, 1] * 32, (2048, 1024)) == 2
    assert size([2, 1, 0, 1] * 16, (2048, 1024)) == 0
    assert size([0] * 64) == 0
    assert size([]) == 0
    # Around a product in fp32 stands too little.
    assert not size([16] * 64, (128, 128), torch.float32)


def test_a_batch_is_not_more_than_twice_the_rows():
    draw = random.Random(0)
    taken = 0
    for _ in range(2000):
        num_experts = draw.choice((8, 16, 64, 128))
        counts = [int(draw.expovariate(1 / draw.choice((1, 8, 40)))) for _ in range(num_experts)]
        num_rows = sum(counts) + draw.choice((0, 0, 17))
        size = size_of(counts, draw.random() < 0.5, num_rows=num_rows)
        assert size * num_experts <= 2 * num_rows
        assert size <= num_rows
        taken += bool(size)
    assert taken > 100


def test_each_product_of_the_same_rows_has_its_own_batch(monkeypatch):
    """What is remembered by the counts, or by the sizes, is told apart by what it depends on."""
    monkeypatch.setattr(pytorch, "_is_native", lambda _: True)
    monkeypatch.setattr(pytorch, "_prefers_onednn", lambda: False)
    pytorch._grouped_mm_of.cache_clear()
    counts = torch.tensor([84, 60, 60, 60, 64, 58, 62, 64] * 2, dtype=torch.int32)
    num_rows = int(counts.sum())
    ends = expert_ends(counts, num_rows)
    sizes = {}
    for key in itertools.product(
        ((256, 384), (256, 640), (640, 256)), (torch.bfloat16, torch.float32), (False, True)
    ):
        shape, dtype, sums_rows = key
        sizes[key] = batched_gemm.batch_size(ends, shape, dtype, sums_rows=sums_rows)
        left = torch.empty(num_rows, shape[0], dtype=dtype)
        right = torch.empty(num_rows if sums_rows else len(counts), *shape[sums_rows:], dtype=dtype)
        grouped_mm = pytorch._grouped_mm(counts, num_rows, left, right)
        assert grouped_mm is not None
        size = pytorch._batch_size(grouped_mm.product, ends) if grouped_mm.may_batch else 0
        assert size == sizes[key]
    pytorch._grouped_mm_of.cache_clear()
    # Each of the three makes a difference here, and so would a square of one of the sizes.
    one = ((256, 384), torch.bfloat16, True)
    for other in (((256, 640), *one[1:]), (one[0], torch.float32, True), (*one[:2], False)):
        assert sizes[one] != sizes[other]
    wide = ((256, 640), torch.bfloat16, False)
    assert sizes[wide] != batched_gemm.batch_size(ends, (256, 256), wide[1], sums_rows=False)


def test_forward_and_dx_share_the_search_for_a_batch(monkeypatch):
    monkeypatch.setattr(pytorch, "_is_native", lambda _: True)
    searched = []

    def no_batch(*args, **_):
        searched.append(args)
        return 0

    monkeypatch.setattr(pytorch, "batch_size", no_batch)
    for function in (pytorch._grouped_mm_of, pytorch._batch_size):
        function.cache_clear()
    counts = torch.full((16,), 64, dtype=torch.int32)
    x = torch.randn(1024, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 64, 32, dtype=torch.bfloat16)
    output = torch.ops.moe.grouped_gemm(x, weight, counts)
    torch.autograd.grad(output, x, torch.randn_like(output))
    pytorch._grouped_mm_of.cache_clear()
    pytorch._batch_size.cache_clear()
    assert len(searched) == 1


@pytest.mark.parametrize("permute_x", [False, True])
def test_an_op_takes_it(permute_x, monkeypatch):
    if not pytorch._is_native(torch.bfloat16):
        pytest.skip("this CPU has no instructions for bf16")
    taken = []
    bmm = torch.bmm

    def counting_bmm(*args, **kwargs):
        taken.append(args)
        return bmm(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", counting_bmm)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (256, 4), generator=generator)
    counts, gather, _ = oracle.routing_indices(ids, 64)
    arguments = {
        "input": torch.randn(256 if permute_x else 1024, 64, generator=generator).bfloat16(),
        "weight": torch.randn(64, 128, 64, generator=generator).bfloat16(),
        "token_counts": counts,
        "gather_indices": gather,
        "top_k": 4,
        "permute_x": permute_x,
    }
    checks.assert_close(torch.ops.moe.grouped_gemm(**arguments), oracle.grouped_gemm(**arguments))
    assert len(taken) == 1


# The experts of 18 tokens' two slots each, so that some have more rows than a batch of 1, 4, 6 or 9.
IDS = {
    "uneven": [0, 1, 0, 2, 0, 3, 1, 0, 2, 0, 0, 5, 1, 2, 0, 5, 3, 0] * 2,
    "dropped": [0, 1, 0, 2, -1, 3, 1, 0, 2, 6, 0, 5, 1, 2, 0, 5, 3, 0] * 2,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IDS)
def test_rows_of_tokens(name, size, sizes):
    """Gathered into the batch, and what is beyond it."""
    sizes["size"] = size
    counts, gather, _ = oracle.routing_indices(torch.tensor(IDS[name]).view(-1, 2), 6)
    x, weight, _ = make_operands(18, torch.float32)
    arguments = {
        "input": x.detach(), "weight": weight.detach(), "token_counts": counts,
        "gather_indices": gather, "top_k": 2, "permute_x": True,
    }  # fmt: skip
    with checks.poisoned_memory():
        output = torch.ops.moe.grouped_gemm(**arguments)
    assert sizes["taken"] == 1
    checks.assert_close(output, oracle.grouped_gemm(**arguments))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("weights_before", [False, True])
def test_the_whole_layer_of_experts(weights_before, name, size, sizes):
    """The second product's rows are summed from where they stand in the batch."""
    sizes["size"] = size
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    arguments = {
        "hidden_states": randn(18, D),
        "gate_up_proj": randn(6, 2 * N, D),
        "down_proj": randn(6, D, N),
        "topk_ids": torch.tensor(IDS[name]).view(-1, 2),
        "topk_weights": randn(18, 2),
        "weights_before": weights_before,
    }
    names = ["hidden_states", "gate_up_proj", "down_proj", "topk_weights"]
    grad_output = randn(18, D)
    expected = oracle.gradients(oracle.fused_experts, arguments, names, grad_output)
    leaves = {n: t.requires_grad_() for n, t in arguments.items() if n in names}
    with checks.poisoned_memory():
        output = torch.ops.moe.fused_experts(**{**arguments, **leaves})
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    # unpermute has a bmm of its own in bf16 and fp16 alone.
    assert sizes["taken"] == 6
    detached = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    checks.assert_close(output, oracle.fused_experts(**detached))
    for n, grad in zip(leaves, grads, strict=True):
        checks.assert_close(grad, expected[n], what=n)
