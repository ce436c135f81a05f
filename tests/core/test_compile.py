# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) gives the same values and recompiles no more than it must."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from testing import checks, moe_block, oracle
from testing.moe_block import BLOCKS, loss_and_gradients, make_tokens, make_weights

blocks = pytest.mark.parametrize("name", sorted(BLOCKS))


@pytest.mark.slow
@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_equals_eager(name, dtype):
    hidden, weights = make_tokens(7, dtype), make_weights(dtype)
    eager = loss_and_gradients(BLOCKS[name], hidden, weights)
    compiled = loss_and_gradients(torch.compile(BLOCKS[name], fullgraph=True), hidden, weights)
    for position, (got, want) in enumerate(zip(compiled, eager, strict=True)):
        assert got.norm() > 0
        checks.assert_close(got, want, what=f"output or gradient {position}")


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_inductor_with_hardly_any_token(num_tokens):
    hidden, weights = make_tokens(num_tokens), make_weights()
    eager = loss_and_gradients(BLOCKS["fused"], hidden, weights)
    compiled = loss_and_gradients(torch.compile(BLOCKS["fused"], fullgraph=True), hidden, weights)
    for got, want in zip(compiled, eager, strict=True):
        checks.assert_close(got, want)


@blocks
def test_compiled_equals_the_oracle(name):
    hidden, weights = make_tokens(9), make_weights()
    compiled = torch.compile(BLOCKS[name], fullgraph=True, backend="aot_eager")
    reference = functools.partial(BLOCKS[name], ops=oracle)
    got = loss_and_gradients(compiled, hidden, weights)
    want = loss_and_gradients(
        reference,
        hidden.detach().double().requires_grad_(),
        moe_block.Weights(*(w.detach().double().requires_grad_() for w in weights.tensors())),
    )
    for position, (actual, expected) in enumerate(zip(got, want, strict=True)):
        checks.assert_close(actual, expected, what=f"output or gradient {position}")


@blocks
def test_token_counts_share_compilations(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(BLOCKS[name], fullgraph=True, backend=counter)
    weights = make_weights()
    for num_tokens in (2, 3, 5, 8, 13):
        loss_and_gradients(compiled, make_tokens(num_tokens), weights)
    assert counter.frame_count <= 2
    for num_tokens in (0, 1):
        before = counter.frame_count
        loss_and_gradients(compiled, make_tokens(num_tokens), weights)
        assert counter.frame_count <= before + 1
    after = counter.frame_count
    for num_tokens in (0, 1, 2, 21):
        got = loss_and_gradients(compiled, make_tokens(num_tokens), weights)
        want = loss_and_gradients(BLOCKS[name], make_tokens(num_tokens), weights)
        for actual, expected in zip(got, want, strict=True):
            checks.assert_close(actual, expected, what=f"{num_tokens} tokens")
    assert counter.frame_count == after


def test_token_count_is_symbolic_from_the_start_with_dynamic():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(BLOCKS["fused"], fullgraph=True, backend=counter, dynamic=True)
    weights = make_weights()
    loss_and_gradients(compiled, make_tokens(2), weights)
    after_one = counter.frame_count
    for num_tokens in (3, 5, 8, 13):
        loss_and_gradients(compiled, make_tokens(num_tokens), weights)
    assert counter.frame_count == after_one


def test_unbacked_token_count():
    """The compiler knows this size only by name, so no check may ask for its value."""
    weights = make_weights()

    def chosen_tokens(hidden, wanted):
        return BLOCKS["fused"](hidden[wanted], weights)

    hidden, wanted = make_tokens(9), torch.arange(9) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen_tokens, fullgraph=True, backend="aot_eager")
        got = compiled(hidden, wanted)
    checks.assert_close(got, BLOCKS["fused"](hidden[wanted], weights))
