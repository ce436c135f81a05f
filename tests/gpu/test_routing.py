# SPDX-License-Identifier: Apache-2.0
"""topk_routing, routing_indices, permute and unpermute are right at real models' sizes.

T tokens, K top_k, R = T * K rows, E experts, H hidden size.
"""

import itertools

import pytest
import torch

import moe_ops
from testing import checks, masked_routing, oracle, reference
from testing.on_device import DEVICE, DTYPES, assert_same_bits
from testing.tolerances import DECIDED_GAP

pytestmark = pytest.mark.gpu

moe = torch.ops.moe
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
scorings = pytest.mark.parametrize(
    ("score_function", "score_before_topk"),
    list(itertools.product(("softmax", "sigmoid"), (True, False))),
)

# T, E, K
ROUTERS = [
    (16384, 128, 8),
    (8192, 256, 8),
    (16384, 32, 4),
    (8192, 8, 2),
    (1000, 60, 4),
    (777, 512, 10),
    (1, 128, 8),
    (5, 3, 3),
    (33, 1, 1),
    (300, 16, 16),
    # As many slots as one warp sorts, and as one program does; and one more.
    (8, 128, 8),
    (13, 64, 5),
    (64, 128, 8),
    (171, 64, 3),
]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("routing", reference.ROUTINGS)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_routing_indices(router, routing, index_dtype):
    num_tokens, num_experts, top_k = router
    if routing == "hot_and_empty" and num_experts <= top_k:
        routing = "uniform"
    ids = reference.route(routing, num_tokens, num_experts, top_k, DEVICE).to(index_dtype)
    want = reference.routing_indices(ids, num_experts)
    for given in (ids, ids.t().contiguous().t()):
        with checks.poisoned_memory():
            got = moe.routing_indices(given, num_experts)
        for one, two in zip(got, want, strict=True):
            assert torch.equal(one, two)


def test_routing_indices_of_ids_that_repeat():
    """A token's experts need not differ, and one expert may take every slot."""
    for high in (1, 2, 300):
        ids = torch.randint(0, high, (30000, 8), device=DEVICE)
        for one, two in zip(
            moe.routing_indices(ids, 256), reference.routing_indices(ids, 256), strict=True
        ):
            assert torch.equal(one, two)


@scorings
@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_topk_routing(router, score_function, score_before_topk, biased):
    num_tokens, num_experts, top_k = router
    dtype = DTYPES[(ROUTERS.index(router) + 2 * biased + score_before_topk) % 3]
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator, device=DEVICE).to(dtype)
    bias = torch.randn(num_experts, generator=generator, device=DEVICE) / 8 if biased else None
    groups = (4, 2, "top2_sum") if num_experts == 256 else (1, 1, "max")
    with checks.poisoned_memory():
        topk_weights, topk_ids = moe.topk_routing(
            logits, top_k, bias, score_function, score_before_topk, True, *groups, 2.5
        )
    keys = reference.selection_keys(logits, bias, score_function, score_before_topk)
    assert_is_a_selection(keys, topk_ids.long(), top_k, groups)
    of_weights = {
        "logits": logits, "topk_ids": topk_ids, "score_function": score_function,
        "score_before_topk": score_before_topk, "renormalize": True, "scaling_factor": 2.5,
    }  # fmt: skip
    checks.assert_close(topk_weights, reference.routing_weights(**of_weights))

    leaf = logits.detach().requires_grad_()
    grad = torch.randn(topk_weights.shape, generator=generator, device=DEVICE)
    output, _ = moe.topk_routing(
        leaf, top_k, bias, score_function, score_before_topk, True, *groups, 2.5
    )
    with checks.poisoned_memory():
        (found,) = torch.autograd.grad(output, leaf, grad)
    expected = oracle.gradients(reference.routing_weights, of_weights, ["logits"], grad)["logits"]
    checks.assert_close(found, expected, scale=2.5 * grad, what="gradient of logits")


def assert_is_a_selection(keys, ids, top_k, groups):
    """Check that ids are those of the best keys, in order, and of equal keys by id.

    Keys that are closer than fp32 tells may change places.
    """
    num_groups, top_groups, _ = groups
    assert (ids.sort(1).values.diff(dim=1) != 0).all(), "ids repeat"
    if num_groups > 1:
        keys = keys.masked_fill(~allowed_experts(keys, ids, num_groups, top_groups), float("-inf"))
    chosen = keys.gather(1, ids)
    assert chosen.isfinite().all(), "an expert of an excluded group"
    assert (chosen.diff(dim=1) <= DECIDED_GAP).all(), "not in descending order"
    equal = chosen.diff(dim=1) == 0
    assert (ids.diff(dim=1)[equal] > 0).all(), "equal keys not by id"
    left, last = keys.scatter(1, ids, float("-inf")), chosen[:, -1:]
    assert (left <= last + DECIDED_GAP).all(), "a better expert is left"
    position = torch.arange(keys.shape[1], device=keys.device)
    assert not ((left == last) & (position < ids[:, -1:])).any(), "an equal lower id is left"


def allowed_experts(keys, ids, num_groups, top_groups):
    """Return the experts of the best groups, or of the groups used where fp32 cannot tell."""
    members = keys.unflatten(1, (num_groups, -1))
    scores = members.topk(2, 2).values.sum(2)
    ordered = scores.sort(1, descending=True).values
    decided = ordered[:, top_groups - 1] - ordered[:, top_groups] > DECIDED_GAP
    assert decided.double().mean() > 0.9
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(1, scores.topk(top_groups, 1).indices, True)
    used = torch.zeros_like(best).scatter_(1, ids // members.shape[2], True)
    assert (used.sum(1) <= top_groups).all()
    groups = torch.where(decided[:, None], best, used)
    return groups[:, :, None].expand_as(members).flatten(1)


@scorings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_experts", [1, 7, 33, 128, 160, 1000])
def test_ties_go_to_the_lower_id(score_function, score_before_topk, dtype, num_experts):
    """They do where equal logits lie in different lanes and warps, too."""
    top_k = min(num_experts, 8)
    logits = torch.full((50, num_experts), 0.3, device=DEVICE).to(dtype)
    call = (top_k, None, score_function, score_before_topk)
    assert moe.topk_routing(logits, *call)[1].tolist() == [list(range(top_k))] * 50
    logits[:, 1::2] = 1.7
    order = [*range(1, num_experts, 2), *range(0, num_experts, 2)]
    assert moe.topk_routing(logits, *call)[1].tolist() == [order[:top_k]] * 50
    # Zero and minus zero are equal.
    logits[:, 0::2], logits[:, 1::2] = 0.0, -0.0
    assert moe.topk_routing(logits, *call)[1].tolist() == [list(range(top_k))] * 50


@scorings
def test_logits_that_are_extreme(score_function, score_before_topk):
    logits = torch.tensor([[1e4, -1e4, 3e4, 0.0], [-2e2, -2e2, -2e2, -2e2]], device=DEVICE)
    logits.requires_grad_()
    weights, ids = moe.topk_routing(logits, 2, None, score_function, score_before_topk, True)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert weights.isfinite().all()
    assert grad.isfinite().all()
    assert ids[1].tolist() == [0, 1]


def test_logits_that_are_not_numbers_give_ids_that_are():
    """The ids of a diverged model must not make the next op access memory out of bounds."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(1000, 60, generator=generator, device=DEVICE)
    for value in (float("nan"), float("inf"), float("-inf")):
        for part in (slice(None), slice(0, 30), slice(7, 8)):
            broken = logits.clone()
            broken[:, part] = value
            for groups in ((1, 1), (4, 2)):
                _, ids = moe.topk_routing(broken, 4, None, "softmax", True, False, *groups)
                assert ((ids >= 0) & (ids < 60)).all()
                assert (ids.sort(1).values.diff(dim=1) != 0).all()


# T, K, H
ROWS = [
    (4096, 8, 2048),
    (1024, 8, 7168),
    (4096, 4, 2880),
    (1000, 2, 129),
    (1, 8, 2048),
    (700, 3, 1),
]


@dtypes
@pytest.mark.parametrize("with_scatter", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_permute_and_unpermute(rows, with_scatter, dtype):
    num_tokens, top_k, hidden_size = rows
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    ids = reference.route("dropped", num_tokens, 64, top_k, DEVICE)
    _, gather, scatter = reference.routing_indices(ids, 64)
    scatter_indices = scatter if with_scatter else None
    tokens = randn(num_tokens, hidden_size).to(dtype).requires_grad_()
    with checks.poisoned_memory():
        permuted = moe.permute(tokens, gather, top_k, scatter_indices)
    assert torch.equal(permuted, tokens[gather.long() // top_k])
    tangent = randn(*permuted.shape).to(dtype)
    with checks.poisoned_memory():
        (found,) = torch.autograd.grad(permuted, tokens, tangent)
    want = reference.unpermute(tangent, gather, None, top_k)
    checks.assert_rounded_once(found, want)

    values = permuted.detach().requires_grad_()
    topk_weights = (randn(num_tokens, top_k).abs() + 0.1).requires_grad_()
    with checks.poisoned_memory():
        output = moe.unpermute(values, gather, topk_weights, top_k, scatter_indices)
    checks.assert_rounded_once(output, reference.unpermute(values, gather, topk_weights, top_k))
    tangent = randn(*output.shape).to(dtype)
    with checks.poisoned_memory():
        found = torch.autograd.grad(output, (values, topk_weights), tangent)
    call = {
        "input": values, "gather_indices": gather, "topk_weights": topk_weights, "top_k": top_k,
    }  # fmt: skip
    expected = oracle.gradients(reference.unpermute, call, ["input", "topk_weights"], tangent)
    checks.assert_rounded_once(found[0], expected["input"])
    checks.assert_close(found[1], expected["topk_weights"], dtype=torch.float32)


def test_unpermute_is_bitwise_what_a_sum_in_slot_order_is():
    rows = torch.randn(4096 * 8, 256, device=DEVICE)
    gather = torch.randperm(4096 * 8, device=DEVICE)
    slots = torch.empty_like(rows).index_copy_(0, gather, rows).view(4096, 8, 256)
    total = torch.zeros(4096, 256, device=DEVICE)
    for choice in range(8):
        total += slots[:, choice]
    assert_same_bits(moe.unpermute(rows, gather, None, 8), total)


@pytest.mark.parametrize("case", masked_routing.CASES)
def test_masked_experts(case):
    logits, top_k, bias, flags, expected = masked_routing.CASES[case]
    selection_bias = None if bias is None else torch.tensor(bias, device="cuda")
    _, topk_ids = moe_ops.topk_routing(
        torch.tensor([logits], device="cuda"), top_k, selection_bias, *flags
    )
    assert topk_ids.tolist() == [expected]
