# SPDX-License-Identifier: Apache-2.0
"""sequence_balance_loss equals numbers worked out by hand and loops over sequences and tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ops.layers import sequence_balance_loss
from testing import checks

over_scores = pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])


def scores_of(row, score_function):
    """Return one token's scores in fp64, up to a common factor."""
    if score_function == "sigmoid":
        return [1 / (1 + (-x).exp()) for x in row]
    largest = max(row.tolist())
    return [(x - largest).exp() for x in row]


def loss_by_loops(layers, num_sequences, top_k, counted, score_function):
    """Compute the loss by equations 17 to 20 of DeepSeek-V3, one sequence and token at a time."""
    losses = []
    for logits in layers:
        num_tokens, num_experts = logits.shape
        length = num_tokens // num_sequences
        for sequence in range(num_sequences):
            slots, probability, num_counted = [0] * num_experts, [0.0] * num_experts, 0
            for token in range(sequence * length, (sequence + 1) * length):
                if not counted[token]:
                    continue
                num_counted += 1
                scores = scores_of(logits[token].double(), score_function)
                chosen = sorted(range(num_experts), key=lambda e: -scores[e].item())[:top_k]
                for expert in range(num_experts):
                    slots[expert] += expert in chosen
                    probability[expert] = probability[expert] + scores[expert] / sum(scores)
            if num_counted:
                f = [num_experts / (top_k * num_counted) * n for n in slots]
                p = [each / num_counted for each in probability]
                losses.append(sum(a * b for a, b in zip(f, p, strict=True)))
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


def assert_same_with_gradient(loss, expected, layers):
    checks.assert_close(loss, expected)
    found = torch.autograd.grad(loss, layers)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, layers)
    else:
        wanted = [torch.zeros_like(logits) for logits in layers]
    for actual, want in zip(found, wanted, strict=True):
        # The gradient of one expert alone, and of even use, is zero: 1 is the size of its terms.
        checks.assert_close(actual, want, scale=torch.ones(()))


def logit(scores):
    return torch.tensor(scores, dtype=torch.float64).logit()


def test_by_hand():
    """The scores are exact fractions.

    The first sequence: both tokens choose expert 0, f = (3, 0, 0), P[0] = (1/2 + 1/2) / 2: 3/2.
    The second: one each for 1 and 0, f = (3/2, 3/2, 0), P = (1/3, 1/3, 1/3): 1.
    """
    logits = logit([[0.75, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.75, 0.5], [0.75, 0.25, 0.5]])
    by_loops = loss_by_loops([logits], 2, 1, [True] * 4, "sigmoid")
    for loss in (by_loops, sequence_balance_loss(logits, 2, 1)):
        assert loss.item() == pytest.approx(1.25, rel=1e-12)
    first = sequence_balance_loss(logits, 2, 1, torch.tensor([[1, 1], [0, 0]]))
    assert first.item() == pytest.approx(1.5, rel=1e-12)


def test_by_hand_softmax():
    """P = (3/4, 1/4) and f = (2, 0)."""
    logits = torch.tensor([[math.log(3), 0.0]] * 4, dtype=torch.float64)
    for loss in (
        loss_by_loops([logits], 2, 1, [True] * 4, "softmax"),
        sequence_balance_loss(logits, 2, 1, score_function="softmax"),
    ):
        assert loss.item() == pytest.approx(1.5, rel=1e-12)


@given(
    num_sequences=st.integers(1, 3),
    length=st.integers(0, 4),
    num_experts=st.integers(1, 5),
    num_layers=st.integers(1, 2),
    score_function=st.sampled_from(["sigmoid", "softmax"]),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_matches_reference(
    num_sequences, length, num_experts, num_layers, score_function, ties, dtype, data
):
    """Many experts get nothing, since sequences are short, and any sequence may be all padding."""
    num_tokens = num_sequences * length
    layers = []
    for _ in range(num_layers):
        logits = torch.randn(num_tokens, num_experts)
        # A few levels that bf16 has: equal logits are common, and bf16 rounds no two to one.
        logits = logits.round() if ties else logits
        layers.append(logits.to(dtype).requires_grad_())
    top_k = data.draw(st.integers(1, num_experts))
    counted = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    mask = torch.tensor(counted).view(num_sequences, length)
    loss = sequence_balance_loss(layers, num_sequences, top_k, mask, score_function)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    expected = loss_by_loops(layers, num_sequences, top_k, counted, score_function)
    assert_same_with_gradient(loss, expected, layers)


@over_scores
def test_without_a_mask_all_tokens_count(score_function):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    loss = sequence_balance_loss(logits, 3, 2, score_function=score_function)
    expected = loss_by_loops([logits], 3, 2, [True] * 12, score_function)
    assert torch.autograd.grad(expected, logits, retain_graph=True)[0].norm() > 0
    assert_same_with_gradient(loss, expected, logits)


@over_scores
def test_even_use_and_collapse(score_function):
    """It is 1 if a sequence uses all experts alike, whatever the other sequences do."""
    even = torch.eye(4).repeat(2, 1) * 1e-3
    collapsed = torch.tensor([[0.0, -200.0, -200.0, -200.0]]).repeat(8, 1)
    for logits, expected in ((even, 1.0), (collapsed, 4.0), (torch.cat([even, collapsed]), 2.5)):
        loss = sequence_balance_loss(logits, len(logits) // 8, 1, score_function=score_function)
        torch.testing.assert_close(loss, torch.tensor(expected))


def test_scores_that_underflow():
    """sigmoid(-200) is zero in fp32. The normalised scores are not 0 / 0."""
    logits = torch.tensor([[-200.0, -201.0, -203.0]] * 2)
    exact = loss_by_loops([logits.double()], 1, 1, [True] * 2, "sigmoid")
    checks.assert_close(sequence_balance_loss(logits, 1, 1), exact)


@over_scores
def test_gradcheck(score_function):
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 0])
    # Far enough from ties: a choice that flips would be a jump.
    assert logits.detach().sort(1).values.diff(dim=1).min() > 1e-3

    def loss_of(logits):
        return sequence_balance_loss(logits, 2, 2, mask, score_function)

    assert torch.autograd.gradcheck(loss_of, logits)


@over_scores
def test_padding_is_not_read(score_function):
    logits, mask = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 1, 0])
    padded = logits.masked_fill(mask[:, None] == 0, float("nan")).requires_grad_()
    loss = sequence_balance_loss(padded, 2, 1, mask, score_function)
    tokens = logits[mask == 1].requires_grad_()
    unpadded = sequence_balance_loss(tokens, 2, 1, score_function=score_function)
    checks.assert_close(loss, unpadded)
    (gradient,), (expected,) = (
        torch.autograd.grad(value, inputs) for value, inputs in ((loss, padded), (unpadded, tokens))
    )
    assert expected.norm() > 1e-2
    checks.assert_close(gradient[mask == 1], expected)
    assert torch.equal(gradient[mask == 0], torch.zeros(2, 4))


@over_scores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_fp32(dtype, score_function):
    arguments = (torch.randn(8, 4).to(dtype), 2, 2, torch.arange(8) % 3, score_function)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sequence_balance_loss(*arguments)
    assert torch.equal(loss, sequence_balance_loss(*arguments))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@over_scores
def test_compiles(score_function, backend):
    compiled = torch.compile(sequence_balance_loss, fullgraph=True, backend=backend)
    for length in (3, 4):
        layers = [torch.randn(2 * length, 4, requires_grad=True) for _ in range(2)]
        counted = [token % 3 > 0 for token in range(2 * length)]
        loss = compiled(layers, 2, 2, torch.tensor(counted), score_function)
        expected = loss_by_loops(layers, 2, 2, counted, score_function)
        assert_same_with_gradient(loss, expected, layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 2, 1), "sequence_balance_loss: expected router_logits of at least one layer"),
        ((torch.zeros(4, 6), 3, 1), r"a multiple of num_sequences \(3\), got 4; pad the sequences"),
        ((torch.zeros(4, 6), 0, 1), "sequence_balance_loss: expected num_sequences >= 1, got 0"),
        ((torch.zeros(4, 6), 2, 1, torch.ones(6)), r"one element per token \(4\), got 6"),
        ((torch.zeros(4, 6), 2, 7), r"moe::topk_routing: expected .*top_k"),
        ((torch.zeros(4, 6), 2, 1, None, "tanh"), "moe::topk_routing: expected score_function"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_balance_loss(*arguments)
