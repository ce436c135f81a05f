# SPDX-License-Identifier: Apache-2.0
"""The oracle gives the numbers worked out by hand, and its gradients pass gradcheck."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from testing import oracle


def test_imports_nothing_of_moe_ops():
    imported = set()
    for path in Path(oracle.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert node.module is not None
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    others = {name for name in imported if not name.startswith("testing.oracle.")}
    assert others == {"itertools", "math", "collections.abc", "typing", "torch"}


def test_routing_indices_by_hand():
    ids = torch.tensor([[1, 0], [-1, 1], [3, 0]])
    counts, gather, scatter = oracle.routing_indices(ids, num_experts=3)
    assert counts.tolist() == [2, 2, 0]
    assert gather.tolist() == [1, 5, 0, 3, 2, 4]
    assert scatter.tolist() == [2, 0, 4, 3, 5, 1]


@pytest.mark.parametrize("routing", oracle.ROUTINGS)
def test_routing_indices_is_a_stable_sort(routing):
    generator = torch.Generator().manual_seed(0)
    num_experts = 5
    top_k = num_experts if routing == "every_expert" else 3
    ids = oracle.random_topk_ids(routing, 7, num_experts, top_k, generator)
    counts, gather, scatter = oracle.routing_indices(ids, num_experts)
    dropped = oracle.dropped_slots(ids, num_experts)
    sortable = torch.where(dropped, num_experts, ids).reshape(-1)
    assert gather.tolist() == torch.argsort(sortable, stable=True).tolist()
    assert counts.tolist() == torch.bincount(sortable, minlength=num_experts + 1)[:-1].tolist()
    assert gather[scatter.long()].tolist() == list(range(7 * top_k))


def test_topk_routing_by_hand():
    logits = torch.log(torch.tensor([[1.0, 4.0, 2.0, 1.0]], dtype=torch.float64))
    weights, ids = oracle.topk_routing(logits, 2)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.25]], dtype=torch.float64))

    weights, _ = oracle.topk_routing(logits, 2, score_before_topk=False)
    torch.testing.assert_close(weights, torch.tensor([[4 / 6, 2 / 6]], dtype=torch.float64))

    weights, _ = oracle.topk_routing(logits, 2, renormalize=True, scaling_factor=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0]], dtype=torch.float64))

    # sigmoid(log a) = a / (1 + a)
    weights, ids = oracle.topk_routing(logits, 2, score_function="sigmoid")
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 5, 2 / 3]], dtype=torch.float64))


def test_topk_routing_ties_go_to_the_lower_id():
    _, ids = oracle.topk_routing(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4)
    assert ids.tolist() == [[1, 2, 4, 0]]
    # Two groups have equal scores: the lower one is chosen.
    _, ids = oracle.topk_routing(
        torch.tensor([[0.0, 3.0, 3.0, 0.0]]), 1, num_groups=2, top_groups=1, group_score="max"
    )
    assert ids.tolist() == [[1]]


def test_topk_routing_bias_moves_the_selection_and_not_the_weights():
    logits = torch.zeros(1, 4, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 1.0, 2.0])
    weights, ids = oracle.topk_routing(logits, 2, bias, "sigmoid")
    assert ids.tolist() == [[3, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("group_score", "expected"), [("max", [0, 1]), ("top2_sum", [2, 3])])
def test_topk_routing_group_scores(group_score, expected):
    # Group 0 holds the best expert, group 1 the best pair.
    logits = torch.tensor([[3.0, -3.0, 1.0, 0.5]])
    _, ids = oracle.topk_routing(
        logits,
        2,
        score_function="sigmoid",
        num_groups=2,
        top_groups=1,
        group_score=group_score,
    )
    assert ids.tolist() == [expected]


def test_permute_and_unpermute_by_hand():
    gather = torch.tensor([1, 2, 0, 3])
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = oracle.permute(tokens, gather, 2)
    assert rows.tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert oracle.unpermute(rows, gather, top_k=2).tolist() == [[2, 4], [6, 8]]
    weights = torch.tensor([[0.5, 1.0], [0.0, 2.0]])
    assert oracle.unpermute(rows, gather, weights, 2).tolist() == [[1.5, 3.0], [6.0, 8.0]]


def test_grouped_gemm_by_hand():
    # A row is one number. Expert 0 doubles it, expert 1 has no row, expert 2 triples it. One row is
    # dropped.
    weight = torch.tensor([2.0, 5.0, 3.0]).reshape(3, 1, 1)
    counts = torch.tensor([2, 0, 1])
    rows = torch.tensor([[1.0], [10.0], [100.0], [float("nan")]])
    assert oracle.grouped_gemm(rows, weight, counts).flatten().tolist() == [2, 20, 300, 0]

    bias = torch.tensor([[1.0], [7.0], [4.0]])
    biased = oracle.grouped_gemm(rows, weight, counts, bias=bias)
    assert biased.flatten().tolist() == [3, 21, 304, 0]

    gather = torch.tensor([3, 0, 1, 2])
    stored = oracle.grouped_gemm(rows, weight, counts, gather, permute_y=True)
    assert stored.flatten().tolist() == [20, 300, 0, 2]

    topk_weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weighted = oracle.grouped_gemm(rows, weight, counts, gather, topk_weights, bias, top_k=2)
    assert weighted.flatten().tolist() == [3 * 4, 21 * 1, 304 * 2, 0]
    unordered = oracle.grouped_gemm(rows, weight, counts, None, topk_weights, bias, top_k=2)
    assert unordered.flatten().tolist() == [3 * 1, 21 * 2, 304 * 3, 0]

    tokens = torch.tensor([[1.0], [10.0]])
    gathered = oracle.grouped_gemm(tokens, weight, counts, gather, top_k=2, permute_x=True)
    assert gathered.flatten().tolist() == [20, 2, 3, 0]


@pytest.mark.parametrize("permute_x", [False, True])
def test_grouped_gemm_gradients_against_differences(permute_x):
    generator = torch.Generator().manual_seed(1)
    ids = oracle.random_topk_ids("dropped", 3, 3, 2, generator)
    counts, gather, _ = oracle.routing_indices(ids, 3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def block(input, weight, topk_weights, bias):
        return oracle.grouped_gemm(
            input, weight, counts, gather, topk_weights, bias, 2, permute_x, False
        )

    inputs = (leaf(3 if permute_x else 6, 4), leaf(3, 5, 4), leaf(3, 2), leaf(3, 5))
    assert torch.autograd.gradcheck(block, inputs)


def test_fused_experts_by_hand():
    """One token of width 2 goes to experts 1 and 0. The other token's second slot is dropped."""
    hidden = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    ids = torch.tensor([[1, 0], [0, 7]])
    weights = torch.tensor([[2.0, 10.0], [1.0, 100.0]])
    # In expert 0 gate is the sum of x and up is x[0], in expert 1 the other way round.
    up = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]])
    down = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    call: dict[str, Any] = {"topk_ids": ids, "topk_weights": weights, "activation": "relu"}
    call |= {"hidden_states": hidden, "gate_up_proj": up, "down_proj": down}
    output, z, counts, gather, _ = oracle.fused_experts_forward(**call)
    assert counts.tolist() == [2, 1]
    assert gather.tolist() == [1, 2, 0, 3]
    assert z.tolist() == [[3, 1], [2, 3], [1, 3], [0, 0]]
    assert output.tolist() == [[10 * 3, 2 * 3], [6, 0]]
    interleaved = oracle.fused_experts(**call, interleaved=True)
    assert interleaved.tolist() == output.tolist()

    biases = {"gate_up_bias": torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "down_bias": 5 * up[:, 0]}
    biased = oracle.fused_experts(**call, **biases)
    assert biased.tolist() == [[10 * (6 + 5) + 2 * 5, 10 * 5 + 2 * 0], [8 + 5, 5]]
    limited = oracle.fused_experts(**call, activation_limit=2.0)
    assert limited.tolist() == [[10 * 2, 2 * 2], [2 * 2, 0]]
    # With inputs 2 and 10 times as large, gate times up is 4 and 100 times as large.
    before = oracle.fused_experts(**call, weights_before=True)
    assert before.tolist() == [[100 * 3, 4 * 3], [6, 0]]
    ungated = oracle.fused_experts(
        **{**call, "gate_up_proj": up[:, :1], "activation": "relu_squared"}, gated=False
    )
    assert ungated.tolist() == [[10 * 9, 2 * 1], [4, 0]]


@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda gate: functional.gelu(gate, approximate="tanh")),
        ("relu", functional.relu),
        ("relu_squared", lambda gate: functional.relu(gate) ** 2),
        ("swiglu_oai", lambda gate: gate / (1 + torch.exp(-1.702 * gate))),
    ],
)
def test_activations(activation, reference):
    gate = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(oracle.activated(gate, activation), reference(gate))
    z = torch.cat([gate, gate.flip(0)])
    offset = 1 if activation == "swiglu_oai" else 0
    found = oracle.activation_of(z, activation, True, False, 2.5)
    expected = reference(gate.clamp(max=2.5)) * (gate.flip(0).clamp(-2.5, 2.5) + offset)
    torch.testing.assert_close(found, expected)
    taking_turns = torch.stack([gate, gate.flip(0)], 1).flatten()
    assert torch.equal(oracle.activation_of(taking_turns, activation, True, True, 2.5), found)


@pytest.mark.parametrize("weights_before", [False, True])
def test_fused_experts_gradients(weights_before):
    """They pass gradcheck. The backward ops equal them, with z given and without."""
    generator = torch.Generator().manual_seed(1)
    ids = oracle.random_topk_ids("dropped", 3, 3, 2, generator)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    leaves = [leaf(3, 4), leaf(3, 6, 4), leaf(3, 4, 3), leaf(3, 2), leaf(3, 6), leaf(3, 4)]
    flags: Any = ("gelu", True, False, 1.5, weights_before)

    def block(x, up, down, topk_weights, up_bias, down_bias):
        return oracle.fused_experts(x, up, down, ids, topk_weights, up_bias, down_bias, *flags)

    assert torch.autograd.gradcheck(block, leaves)
    x, up, down, topk_weights, up_bias, down_bias = leaves
    expected = torch.autograd.grad(block(*leaves).sum(), leaves)
    _, z, *routing = oracle.fused_experts_forward(
        x, up, down, ids, topk_weights, up_bias, down_bias, *flags
    )
    for given in (None, z.detach()):
        arguments: Any = [x, up, down, topk_weights, up_bias, down_bias, given, *routing, *flags]
        arguments += [[True, True, not weights_before, True], False]
        dz, grad_down, grad_weights, grad_down_bias = oracle.fused_experts_down_backward(
            torch.ones(3, 4), *arguments
        )
        assert dz is not None
        arguments = [x, up, topk_weights if weights_before else None, *routing, 2]
        arguments += [[True, True, weights_before, True], False]
        grad_x, grad_up, grad_before, grad_up_bias = oracle.fused_experts_up_backward(
            dz, *arguments
        )
        grad_weights = grad_before if weights_before else grad_weights
        found = [grad_x, grad_up, grad_down, grad_weights, grad_up_bias, grad_down_bias]
        for got, want in zip(found, expected, strict=True):
            assert got is not None
            torch.testing.assert_close(got, want)


def test_routing_gradient_by_hand():
    # d softmax_0 / d logits = s_0 * (e_0 - s)
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    grads = oracle.gradients(
        oracle.topk_routing, {"logits": logits, "top_k": 1}, ["logits"], torch.ones(1, 1)
    )
    expected = torch.tensor([[3 / 16, -3 / 16]], dtype=torch.float64)
    torch.testing.assert_close(grads["logits"], expected)


def test_selection_gap_by_hand():
    def gap(keys, top_k, *groups):
        return oracle.selection_gap(keys, top_k, *groups)

    # In order 8, 5, 5, 1: the choice of two rests on 8 - 5, the order of the fives on nothing.
    assert gap([5.0, 8.0, 1.0, 5.0], 1, 1, 1, "max") == 3.0
    assert gap([5.0, 8.0, 1.0, 5.0], 2, 1, 1, "max") == 3.0
    assert gap([5.0, 5.0], 1, 1, 1, "max") == math.inf
    # Groups (8, 1) and (6, 2): 9 - 8 by their sums, 8 - 6 by their best.
    assert gap([8.0, 1.0, 2.0, 6.0], 1, 2, 1, "top2_sum") == 1.0
    assert gap([8.0, 1.0, 2.0, 6.0], 1, 2, 1, "max") == 2.0
    # Equal sums of the same keys are decided by the id, of other keys by rounding.
    assert gap([8.0, 1.0, 1.0, 8.0], 1, 2, 1, "top2_sum") == 7.0
    assert gap([8.0, 1.0, 2.0, 7.0], 1, 2, 1, "top2_sum") == 0.0
    # All groups are chosen: nothing rests on their scores.
    assert gap([8.0, 1.0, 2.0, 7.0], 1, 2, 2, "top2_sum") == 1.0


def test_dispatch_and_combine_on_two_ranks_by_hand():
    """Each rank has two of four experts, and room for two tokens of each rank."""
    inputs = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])]
    ids = [torch.tensor([[0, 3], [1, 0], [0, -1]]), torch.tensor([[2, 1]])]
    weights = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), torch.tensor([[0.7, 0.8]])]
    first, second = oracle.expert_parallel.dispatch(inputs, ids, weights, 4, 2)
    nan = float("nan")
    torch.testing.assert_close(
        first[0].flatten(), torch.tensor([1.0, 2, 4, nan]).double(), equal_nan=True
    )
    torch.testing.assert_close(
        second[0].flatten(), torch.tensor([1.0, nan, 4, nan]).double(), equal_nan=True
    )
    assert first[1].tolist() == [[0, -1], [1, 0], [1, -1], [-1, -1]]
    assert second[1].tolist() == [[1, -1], [-1, -1], [0, -1], [-1, -1]]
    torch.testing.assert_close(
        first[2], torch.tensor([[0.1, 0], [0.3, 0.4], [0.8, 0], [0, 0]]).double()
    )
    assert first[3].tolist() == [[0, 4], [2, 3], [-1, -1]]
    assert second[3].tolist() == [[4, 0]]
    assert (first[4].tolist(), second[4].tolist()) == ([1], [0])
    outputs = [10 * first[0], 100 * second[0]]
    sums = oracle.expert_parallel.combine(outputs, [first[3], second[3]], 4, 2)
    assert [each.flatten().tolist() for each in sums] == [[110.0, 20.0, 0.0], [440.0]]
