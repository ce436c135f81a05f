# SPDX-License-Identifier: Apache-2.0
"""The two GEMMs of an expert block are right at real models' sizes and past 2^31 elements.

A product Y = X @ W is checked in two ways. A few experts are compared with fp64 element by element.
All rows of all experts are projected on a random v of signs: Y @ v is compared with X @ (W @ v).
That takes only matrix-vector products, and shows any element of Y that is off by about its size.

T tokens, H hidden size, I intermediate size, E experts, K top_k, R = T * K rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from testing import checks, device_memory, reference
from testing.checks import assert_rounded_once, assert_rows_close
from testing.model_sizes import MODELS, Model
from testing.on_device import DEVICE, assert_same_bits, memory_slot
from testing.tolerances import RELATIVE_NORM

pytestmark = pytest.mark.gpu

moe = torch.ops.moe


ROUTINGS = {
    **dict.fromkeys(MODELS, ("uniform",)),
    "qwen3-30b": ("uniform", "zipf", "hot_and_empty", "dropped"),
    "gptoss20b": ("uniform", "hot_and_empty"),
    "decode-64": ("uniform", "dropped"),
}
CASES = [
    pytest.param(model, routing, id=f"{model}-{routing}")
    for model, routings in ROUTINGS.items()
    for routing in routings
]


@dataclass
class Routed:
    """Holds a routing, and its rows per expert on the host."""

    counts: Tensor
    gather: Tensor
    top_k: int

    def __post_init__(self) -> None:
        self.sizes: list[int] = self.counts.tolist()
        self.slots = self.gather[: sum(self.sizes)].long()

    def experts(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for e, size in enumerate(self.sizes):
            yield e, slice(start, start + size)
            start += size

    def sampled(self) -> set[int]:
        """Return the experts with most and with fewest rows, the first and the last."""
        order = sorted(range(len(self.sizes)), key=self.sizes.__getitem__)
        return {order[0], order[-1], 0, len(self.sizes) - 1}


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(scale)


def signs(size: int) -> Tensor:
    return torch.randint(0, 2, (size,), device=DEVICE).double() * 2 - 1


LIMIT = RELATIVE_NORM[torch.bfloat16]


def check_rows(
    y: Tensor,
    x: Tensor,
    matrices: Tensor,
    routed: Routed,
    what: str,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Check that y[i] is scale[i] * (x[i] @ matrices[e] + bias[e]). Rows are in expert order."""
    v = signs(matrices.shape[2])
    for e, rows in routed.experts():
        if rows.start == rows.stop:
            continue
        left, right, got = x[rows].double(), matrices[e].double(), y[rows].double()
        factor = 1 if scale is None else scale[rows].double()
        offset = left.new_zeros(len(v)) if bias is None else bias[e].double()
        if e in routed.sampled():
            want = left @ right + offset
            want = want if scale is None else want * scale[rows, None].double()
            assert_rows_close(y[rows], want, torch.bfloat16, f"{what}, expert {e}")
        wanted = (left @ (right @ v) + offset @ v) * factor
        limit = LIMIT * got.norm(dim=1).clamp_min(1e-30)
        wrong = ~((got @ v - wanted).abs() <= limit)
        assert not wrong.any(), f"{what}, expert {e}: {int(wrong.sum())} wrong rows"
    assert (y[sum(routed.sizes) :] == 0).all(), f"{what}: rows of no expert"


def check_weight_gradient(
    grad: Tensor,
    g: Tensor,
    x: Tensor,
    routed: Routed,
    what: str,
    scale: Tensor | None = None,
) -> None:
    """Check that grad[e] is the sum of outer(scale[i] * g[i], x[i]) over the rows of e."""
    v = signs(x.shape[1])
    for e, rows in routed.experts():
        if rows.start == rows.stop:
            assert not grad[e].any(), f"{what}: expert {e} has no rows"
            continue
        left, right = g[rows].double(), x[rows].double()
        if scale is not None:
            left *= scale[rows, None].double()
        if e in routed.sampled():
            assert_rows_close(grad[e], left.T @ right, torch.bfloat16, f"{what}, expert {e}")
        got = grad[e].double()
        wrong = ~((got @ v - left.T @ (right @ v)).abs() <= LIMIT * got.norm(dim=1))
        assert not wrong.any(), f"{what}, expert {e}: {int(wrong.sum())} wrong rows"


def route(model: Model, routing: str) -> Routed:
    ids = reference.route(routing, model.num_tokens, model.num_experts, model.top_k, DEVICE)
    counts, gather, _ = moe.routing_indices(ids, model.num_experts)
    want_counts, want_gather, _ = reference.routing_indices(ids, model.num_experts)
    assert torch.equal(counts, want_counts)
    assert torch.equal(gather, want_gather)
    return Routed(counts, gather, model.top_k)


@pytest.fixture(autouse=True)
def _memory():
    with memory_slot():
        yield


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_gate_up(name, routing):
    """The GEMM gathers rows from token order, as the first GEMM of a block does."""
    model = MODELS[name]
    routed = route(model, routing)
    hidden, width = model.hidden_size, 2 * model.intermediate_size
    tokens = randn(model.num_tokens, hidden)
    weight = randn(model.num_experts, width, hidden, scale=hidden**-0.5)
    bias = randn(model.num_experts, width) if model.bias else None
    flags = (model.top_k, True, False)
    arguments = (routed.counts, routed.gather, None)
    output = moe.grouped_gemm(tokens, weight, *arguments, bias, *flags)
    in_order = tokens[routed.gather.long() // model.top_k]
    check_rows(output, in_order, weight.mT, routed, "forward", bias=bias)

    grad_output = output.copy_(randn(*output.shape))
    grad_weight, grad_bias = moe.grouped_gemm_dw(
        grad_output, tokens, *arguments, *flags, [True, model.bias], False
    )
    check_weight_gradient(grad_weight, grad_output, in_order, routed, "dW")
    if model.bias:
        check_bias_gradient(grad_bias, grad_output, routed)
    del grad_weight, in_order

    # Every row is compared before the sum over slots, which rounds once more.
    rows, _ = moe.grouped_gemm_dx(
        grad_output, weight, routed.counts, None, None, None, None, 1, False, False, [True, False]
    )
    check_rows(rows, grad_output, weight, routed, "dX of rows")
    grad_tokens, _ = moe.grouped_gemm_dx(
        grad_output, weight, *arguments, None, None, *flags, [True, False]
    )
    want = sum_of_slots(rows, routed, model)
    assert_rows_close(grad_tokens, want, torch.bfloat16, "dX")


def check_bias_gradient(grad_bias: Tensor, grad_output: Tensor, routed: Routed) -> None:
    want = torch.stack([grad_output[rows].double().sum(0) for _, rows in routed.experts()])
    checks.assert_close(grad_bias, want, what="dbias")


def sum_of_slots(rows: Tensor, routed: Routed, model: Model) -> Tensor:
    """Sum each token's rows by chunks of columns, as fp64 copies of all rows would be large."""
    slots = routed.gather.long()
    columns = [
        torch.zeros(model.num_tokens, part.shape[1], dtype=torch.float64, device=DEVICE).index_add_(
            0, slots // model.top_k, part.double()
        )
        for part in rows.split(512, dim=1)
    ]
    return torch.cat(columns, 1)


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_down(name, routing):
    """The GEMM weights rows and stores them in slot order, as the second GEMM of a block does."""
    model = MODELS[name]
    routed = route(model, routing)
    hidden, width = model.hidden_size, model.intermediate_size
    rows = randn(model.num_tokens * model.top_k, width)
    weight = randn(model.num_experts, hidden, width, scale=width**-0.5)
    bias = randn(model.num_experts, hidden) if model.bias else None
    topk_weights = torch.rand(model.num_tokens, model.top_k, device=DEVICE) + 0.1
    flags = (model.top_k, False, True)
    arguments = (routed.counts, routed.gather, topk_weights)
    output = moe.grouped_gemm(rows, weight, *arguments, bias, *flags)
    slots = routed.gather.long()
    scale = topk_weights.view(-1)[slots]
    check_rows(output[slots], rows, weight.mT, routed, "forward", scale=scale, bias=bias)

    grad_output = output.copy_(randn(*output.shape))
    g = grad_output[slots]
    grad_rows, grad_topk = moe.grouped_gemm_dx(
        grad_output, weight, *arguments, rows, bias, *flags, [True, True]
    )
    check_rows(grad_rows, g, weight, routed, "dX", scale=scale)
    want = torch.zeros_like(scale, dtype=torch.float64)
    for e, part in routed.experts():
        products = g[part].double() @ weight[e].double()
        dots = (products * rows[part].double()).sum(1)
        want[slots[part]] = dots if bias is None else dots + g[part].double() @ bias[e].double()
    checks.assert_close(grad_topk.view(-1), want, what="gradient of topk_weights")
    del grad_rows

    grad_weight, grad_bias = moe.grouped_gemm_dw(
        grad_output, rows, *arguments, *flags, [True, model.bias], False
    )
    check_weight_gradient(grad_weight, g, rows, routed, "dW", scale=scale)
    if model.bias:
        check_bias_gradient(grad_bias, g * scale[:, None], routed)


@pytest.mark.parametrize("name", ["qwen3-30b", "weights-past-int32"])
def test_transposed_weight(name):
    """A weight stored as (E, D, N) is not copied. Its gradient is stored likewise."""
    model = MODELS[name]
    routed = route(model, "uniform")
    hidden, width = model.hidden_size, 2 * model.intermediate_size
    tokens = randn(model.num_tokens, hidden)
    weight = randn(model.num_experts, hidden, width, scale=hidden**-0.5).mT
    flags = (model.top_k, True, False)
    arguments = (routed.counts, routed.gather, None)
    torch.cuda.reset_peak_memory_stats()
    before = device_memory.held()
    output = moe.grouped_gemm(tokens, weight, *arguments, None, *flags)
    used = device_memory.most_held() - before
    assert used < output.nbytes + weight.nbytes / 4, "the weight was copied"
    in_order = tokens[routed.gather.long() // model.top_k]
    check_rows(output, in_order, weight.mT, routed, "forward")
    grad_output = output.copy_(randn(*output.shape))
    grad_weight, _ = moe.grouped_gemm_dw(
        grad_output, tokens, *arguments, *flags, [True, False], True
    )
    assert grad_weight.stride() == weight.stride()
    check_weight_gradient(grad_weight, grad_output, in_order, routed, "dW")
    rows, _ = moe.grouped_gemm_dx(
        grad_output, weight, routed.counts, None, None, None, None, 1, False, False, [True, False]
    )
    check_rows(rows, grad_output, weight, routed, "dX")


@pytest.mark.parametrize("weighted", [False, True])
def test_permutations_past_int32(weighted):
    """R * H is 2.4e9. permute is exact, and unpermute is compared with fp64 by chunks."""
    num_tokens, top_k, hidden = 147456, 8, 2048
    num_rows = num_tokens * top_k
    gather = torch.randperm(num_rows, device=DEVICE).int()
    tokens = randn(num_tokens, hidden).requires_grad_()
    output = moe.permute(tokens, gather, top_k)
    for rows in torch.arange(num_rows, device=DEVICE).split(1 << 17):
        assert torch.equal(output[rows], tokens[gather[rows].long() // top_k])
    values = output.detach().copy_(randn(num_rows, hidden)).requires_grad_()
    topk_weights = torch.rand(num_tokens, top_k, device=DEVICE).requires_grad_()
    given = topk_weights if weighted else None
    combined = moe.unpermute(values, gather, given, top_k)
    scatter = torch.empty_like(gather).scatter_(
        0, gather.long(), torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    )
    for chosen in torch.arange(num_tokens, device=DEVICE).split(1 << 14):
        rows = values[scatter.view(-1, top_k)[chosen].long()].double()
        if weighted:
            rows = rows * topk_weights[chosen][:, :, None].double()
        want = rows.sum(1)
        assert_rounded_once(combined[chosen], want)
    if not weighted:
        return
    tangent = randn(num_tokens, hidden)
    found = torch.autograd.grad(combined, (values, topk_weights), tangent)
    for chosen in torch.arange(num_tokens, device=DEVICE).split(1 << 14):
        rows = scatter.view(-1, top_k)[chosen].long()
        want = tangent[chosen][:, None].double() * topk_weights[chosen][:, :, None].double()
        assert_rounded_once(found[0][rows], want)
        want = (tangent[chosen][:, None].double() * values[rows].double()).sum(2)
        checks.assert_close(found[1][chosen], want)


def test_router_past_int32():
    """T * E is 2.1e9. The last tokens are routed as a small call routes them."""
    num_tokens, num_experts, top_k = (1 << 24) + 17, 128, 8
    logits = torch.randn(num_tokens, num_experts, device=DEVICE, dtype=torch.bfloat16)
    logits.requires_grad_()
    topk_weights, topk_ids = moe.topk_routing(logits, top_k)
    (grad,) = torch.autograd.grad(topk_weights, logits, torch.ones_like(topk_weights))
    for part in (slice(0, 4096), slice(num_tokens - 4096, num_tokens)):
        some = logits[part].detach().clone().requires_grad_()
        want = moe.topk_routing(some, top_k)
        assert_same_bits((topk_weights[part], topk_ids[part]), want)
        (want_grad,) = torch.autograd.grad(want[0], some, torch.ones_like(want[0]))
        assert_same_bits(grad[part], want_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wide", ["input", "weight", "grad_output"])
def test_strides_past_int32(wide, dtype):
    """Few elements stand so far apart that a stride times an index or a block passes 2^31."""
    far = 1 << 27
    num_rows, width = 48, 40

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    def spread(tensor: Tensor) -> Tensor:
        """Return the same values with `far` elements between columns."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        memory = tensor.new_empty(flat.shape[1], far)
        memory[:, : flat.shape[0]] = flat.T
        return memory[:, : flat.shape[0]].T.unflatten(0, tensor.shape[:-1])

    tensors = {"input": randn(num_rows, width), "weight": randn(2, width, width)}
    tensors["grad_output"] = randn(num_rows, width)
    counts = torch.tensor([num_rows // 3, num_rows // 2], device=DEVICE)

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        input, weight = (given[n].detach().requires_grad_() for n in ("input", "weight"))
        output = moe.grouped_gemm(input, weight, counts)
        grads = torch.autograd.grad(output, (input, weight), given["grad_output"])
        return [output.detach(), *grads]

    want = run(tensors)
    got = run({**tensors, wide: spread(tensors[wide])})
    for one, two in zip(got, want, strict=True):
        checks.assert_close(one, two)
