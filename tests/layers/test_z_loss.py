# SPDX-License-Identifier: Apache-2.0
"""router_z_loss equals numbers worked out by hand and loops over tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ops.layers import router_z_loss
from testing import checks


def z_loss_by_loops(layers, counted):
    """Compute the loss by its definition in fp64, one token at a time."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for logits in layers:
        for row, is_counted in zip(logits.double(), counted, strict=True):
            if is_counted:
                largest = max(row.tolist())
                total = total + (largest + sum((x - largest).exp() for x in row).log()) ** 2
                num_tokens += 1
    return total / num_tokens if num_tokens else total


def assert_same_with_gradient(loss, expected, layers):
    checks.assert_close(loss, expected)
    found = torch.autograd.grad(loss, layers)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, layers)
    else:
        wanted = [torch.zeros_like(logits) for logits in layers]
    for actual, want in zip(found, wanted, strict=True):
        checks.assert_close(actual, want)


def test_by_hand():
    """logsumexp is log 2 in the first row and log 4 in the second."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    expected = torch.tensor((1 + 4) / 2 * math.log(2) ** 2, dtype=torch.float64)
    checks.assert_close(z_loss_by_loops([logits], [True, True]), expected)
    checks.assert_close(router_z_loss(logits), expected)
    second = torch.tensor(4 * math.log(2) ** 2, dtype=torch.float64)
    checks.assert_close(router_z_loss(logits, torch.tensor([0, 1])), second)


@given(
    num_tokens=st.integers(0, 7),
    num_experts=st.integers(1, 5),
    num_layers=st.integers(1, 3),
    size=st.sampled_from([0.0, 1.0, 200.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_matches_reference(num_tokens, num_experts, num_layers, size, dtype, data):
    """Logits of 200 overflow exp in fp32. A token of equal logits is a tie."""
    layers = [
        (size * torch.randn(num_tokens, num_experts)).to(dtype).requires_grad_()
        for _ in range(num_layers)
    ]
    counted = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    mask = torch.tensor(counted, dtype=data.draw(st.sampled_from([torch.bool, torch.long])))
    loss = router_z_loss(layers, mask)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_same_with_gradient(loss, z_loss_by_loops(layers, counted), layers)


def test_without_a_mask_all_tokens_count():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradient(router_z_loss(logits), z_loss_by_loops([logits], [True] * 6), logits)


def test_gradcheck():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0])
    assert torch.autograd.gradcheck(router_z_loss, (logits, mask))


def test_padding_is_not_read():
    logits, mask = torch.randn(6, 4), torch.tensor([1, 0, 1, 1, 0, 1])
    padded = logits.masked_fill(mask[:, None] == 0, float("nan")).requires_grad_()
    loss = router_z_loss(padded, mask)
    checks.assert_close(loss, router_z_loss(logits[mask == 1]))
    (gradient,) = torch.autograd.grad(loss, padded)
    assert gradient[mask == 1].any(1).all()
    assert torch.equal(gradient[mask == 0], torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_fp32(dtype):
    logits, mask = torch.randn(9, 4).to(dtype), torch.arange(9) % 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = router_z_loss(logits, mask)
    assert torch.equal(loss, router_z_loss(logits, mask))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(backend):
    compiled = torch.compile(router_z_loss, fullgraph=True, backend=backend)
    for num_tokens in (6, 9):
        layers = [torch.randn(num_tokens, 4, requires_grad=True) for _ in range(2)]
        counted = [token % 3 > 0 for token in range(num_tokens)]
        loss = compiled(layers, torch.tensor(counted))
        assert_same_with_gradient(loss, z_loss_by_loops(layers, counted), layers)


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        ((), None, "router_z_loss: expected router_logits of at least one layer, got none"),
        (torch.zeros(4), None, r"router_z_loss: .* shape \(num_tokens, num_experts\), got \(4,\)"),
        (torch.zeros(4, 6), torch.ones(2, 3), r"one element per token \(4\), got 6"),
    ],
)
def test_rejects(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        router_z_loss(logits, mask)
