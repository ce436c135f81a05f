# SPDX-License-Identifier: Apache-2.0
"""The activations in PyTorch equal the oracle in values and gradients, at a limit too.

R rows, I (WIDTH) intermediate size, U = 2 * I where gated, else I.
"""

import itertools

import pytest
import torch
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from moe_ops._pytorch.activation import (
    ACTIVATIONS,
    GATE_ACTIVATIONS,
    Activation,
    gate_function,
)
from testing import checks, oracle

R, WIDTH = 11, 6
LIMIT = 0.7
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FORMS = {"gate, up": (True, False), "interleaved": (True, True), "ungated": (False, False)}
# swiglu_oai is left out ungated, because it multiplies by up.
CASES = [
    (name, *FORMS[form], limit)
    for name, form, limit in itertools.product(ACTIVATIONS, FORMS, (None, LIMIT))
    if (name, form) != ("swiglu_oai", "ungated")
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def operands(gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return z (R, U), the gradient of h (R, I) and a scale (R, 1)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return randn(R, 2 * WIDTH if gated else WIDTH), randn(R, WIDTH), randn(R, 1)


def expected_h(z: Tensor, case: tuple[str, bool, bool, float | None]) -> Tensor:
    return torch.stack([oracle.activation_of(row, *case) for row in z.double()])


def test_the_names_are_the_schemas():
    assert SCHEMAS["fused_experts"].argument("activation").choices == ACTIVATIONS


@cases
@dtypes
def test_apply(dtype, case):
    z, grad_h, _ = operands(case[1], dtype)
    wide = z.double().clone().requires_grad_()
    expected = expected_h(wide, case)
    leaf = z.clone().requires_grad_()
    h = Activation(*case).apply(leaf)
    assert h.dtype == dtype
    checks.assert_close(h, expected)
    (grad,) = torch.autograd.grad(h, leaf, grad_h)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad_h.double())
    checks.assert_close(grad, expected_grad)


@dtypes
def test_apply_rounds_once(dtype):
    z, _, _ = operands(True, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for case in CASES:
        if case[1]:
            once = Activation(*case).apply(z.to(wide)).to(dtype)
            assert torch.equal(Activation(*case).apply(z), once)


@pytest.mark.parametrize("scaled", [False, True])
@cases
@dtypes
def test_backward(dtype, case, scaled):
    z, grad_h, scale = operands(case[1], dtype)
    wide = z.double().clone().requires_grad_()
    factor = scale.double() if scaled else torch.ones(R, 1, dtype=torch.float64)
    plain = expected_h(wide, case)
    scaled_grad = factor * grad_h.double()
    (expected_grad,) = torch.autograd.grad(plain, wide, scaled_grad)
    expected = {
        "h": factor * plain.detach(),
        "grad_z": expected_grad,
        "dots": (grad_h.double() * plain.detach()).sum(1),
    }
    accumulator = torch.promote_types(dtype, torch.float32)
    for asked in itertools.product([False, True], repeat=3):
        outputs = {
            name: torch.full_like(
                expected[name], float("nan"), dtype=accumulator if name == "dots" else dtype
            )
            for name, is_asked in zip(expected, asked, strict=True)
            if is_asked
        }
        given = z.clone(), grad_h.clone()
        Activation(*case).backward(*given, scale if scaled else None, **outputs)
        assert torch.equal(given[0], z)
        assert torch.equal(given[1], grad_h)
        for name, found in outputs.items():
            terms = grad_h.double() * plain.detach() if name == "dots" else None
            checks.assert_close(found, expected[name], scale=terms, what=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_at_a_limit_and_beyond_it(interleaved, name):
    """Exactly at the limit gate and up have their gradients. Beyond it they are zero."""
    beyond = 2 * LIMIT
    gates = [LIMIT, beyond, -LIMIT, -beyond, 0.5, 0.5, 0.5, 0.5]
    ups = [0.5, 0.5, 0.5, 0.5, LIMIT, beyond, -LIMIT, -beyond]
    pair = [torch.tensor([values], dtype=torch.float64) for values in (gates, ups)]
    z = torch.stack(pair, 2).flatten(1) if interleaved else torch.cat(pair, 1)
    grad_h = torch.ones(1, len(gates), dtype=torch.float64)
    limited = Activation(name, interleaved=interleaved, limit=LIMIT)
    unlimited = Activation(name, interleaved=interleaved)

    def halves(grad: Tensor) -> tuple[Tensor, Tensor]:
        if interleaved:
            return grad[0, 0::2], grad[0, 1::2]
        return grad[0, : len(gates)], grad[0, len(gates) :]

    def gradients(activation: Activation) -> list[tuple[Tensor, Tensor]]:
        leaf, written = z.clone().requires_grad_(), torch.empty_like(z)
        (recorded,) = torch.autograd.grad(activation.apply(leaf), leaf, grad_h)
        activation.backward(z, grad_h, grad_z=written)
        return [halves(recorded), halves(written)]

    for (gate, up), (free_gate, free_up) in zip(
        gradients(limited), gradients(unlimited), strict=True
    ):
        # At the limit, and for a gate below -limit, the gradient is as without a limit.
        assert torch.equal(gate[[0, 2, 3, 4]], free_gate[[0, 2, 3, 4]])
        assert gate[0] != 0
        assert gate[1] == 0
        assert torch.equal(up[[4, 6]], free_up[[4, 6]])
        assert (up[[4, 6]] != 0).all()
        assert (up[[5, 7]] == 0).all()


@pytest.mark.parametrize("name", GATE_ACTIVATIONS)
@dtypes
def test_gate_function(dtype, name):
    gate, _, _ = operands(False, dtype)
    checks.assert_close(gate_function(name)(gate), expected_h(gate, (name, False, False, None)))


def test_a_function_of_more_than_the_gate():
    assert set(ACTIVATIONS) - set(GATE_ACTIVATIONS) == {"swiglu_oai"}
    with pytest.raises(ValueError, match=r"expected an activation in .*, got 'swiglu_oai'"):
        gate_function("swiglu_oai")
