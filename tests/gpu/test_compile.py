# SPDX-License-Identifier: Apache-2.0
"""The blocks of testing/moe_block.py run on CUDA, compiled by Inductor and in CUDA graphs."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from testing import checks, moe_block
from testing.moe_block import EVERY_BLOCK, Weights
from testing.on_device import DEVICE, assert_same_bits

pytestmark = pytest.mark.gpu

blocks = pytest.mark.parametrize("name", sorted(EVERY_BLOCK))
# These sizes have several tiles, and rows that descriptors can read.
HIDDEN, INTERMEDIATE, EXPERTS = 128, 96, 8


def make_weights(dtype: torch.dtype) -> Weights:
    weights = moe_block.make_weights(dtype, EXPERTS, HIDDEN, INTERMEDIATE)
    return Weights(*(w.detach().to(DEVICE).requires_grad_() for w in weights.tensors()))


def make_tokens(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return moe_block.make_tokens(num_tokens, dtype, HIDDEN).detach().to(DEVICE).requires_grad_()


def loss_and_gradients(block, hidden: torch.Tensor, weights: Weights) -> list[torch.Tensor]:
    """Return the output, and the gradients of input and parameters for a fixed tangent."""
    output = block(hidden, weights)
    return [output, *torch.autograd.grad(output, [hidden, *weights.tensors()], tangent_of(output))]


def tangent_of(output: torch.Tensor) -> torch.Tensor:
    line = torch.linspace(-1, 1, output.numel(), device=output.device)
    return line.to(output.dtype).view_as(output)


def assert_alike(got, want, what=""):
    for position, (one, two) in enumerate(zip(got, want, strict=True)):
        assert two.norm() > 0 or one.numel() == 0
        checks.assert_close(one, two, what=f"{what}: output or gradient {position}")


@blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_inductor_equals_eager(name, dtype):
    hidden, weights = make_tokens(700, dtype), make_weights(dtype)
    eager = loss_and_gradients(EVERY_BLOCK[name], hidden, weights)
    compiled = torch.compile(EVERY_BLOCK[name], fullgraph=True)
    with checks.poisoned_memory():
        got = loss_and_gradients(compiled, hidden, weights)
    assert_alike(got, eager)


@blocks
def test_eager_equals_the_cpu(name):
    """In fp32 both choose the same experts, but for near ties."""
    hidden, weights = make_tokens(300, torch.float32), make_weights(torch.float32)
    on_cpu = Weights(*(w.detach().cpu().requires_grad_() for w in weights.tensors()))
    want = loss_and_gradients(EVERY_BLOCK[name], hidden.detach().cpu().requires_grad_(), on_cpu)
    got = loss_and_gradients(EVERY_BLOCK[name], hidden, weights)
    assert_alike([tensor.cpu() for tensor in got], want)


@blocks
def test_token_counts_share_compilations(name):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(EVERY_BLOCK[name], fullgraph=True, backend=counter)
    weights = make_weights(torch.bfloat16)
    for num_tokens in (300, 301, 77, 1200, 2):
        hidden = make_tokens(num_tokens, torch.bfloat16)
        got = loss_and_gradients(compiled, hidden, weights)
        assert_alike(got, loss_and_gradients(EVERY_BLOCK[name], hidden, weights), f"T={num_tokens}")
    assert counter.frame_count <= 2


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_inductor_with_hardly_any_token(num_tokens):
    hidden, weights = make_tokens(num_tokens, torch.bfloat16), make_weights(torch.bfloat16)
    eager = loss_and_gradients(EVERY_BLOCK["fused"], hidden, weights)
    compiled = torch.compile(EVERY_BLOCK["fused"], fullgraph=True)
    for got, want in zip(loss_and_gradients(compiled, hidden, weights), eager, strict=True):
        checks.assert_close(got, want)


def test_inductor_with_its_own_graphs():
    """mode="reduce-overhead" records CUDA graphs of forward and backward."""
    weights = make_weights(torch.bfloat16)
    compiled = torch.compile(EVERY_BLOCK["fused"], fullgraph=True, mode="reduce-overhead")
    for step in range(5):
        hidden = (make_tokens(300, torch.bfloat16).detach() * (1 + step)).requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        got = [tensor.clone() for tensor in loss_and_gradients(compiled, hidden, weights)]
        assert_alike(got, loss_and_gradients(EVERY_BLOCK["fused"], hidden, weights), f"step {step}")


def test_inductor_in_inference():
    hidden, weights = make_tokens(300, torch.bfloat16), make_weights(torch.bfloat16)
    compiled = torch.compile(EVERY_BLOCK["fused"], fullgraph=True)
    with torch.no_grad():
        checks.assert_close(compiled(hidden, weights), EVERY_BLOCK["fused"](hidden, weights))


@blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [5, 700])
def test_graph_of_a_training_step_equals_eager(name, dtype, num_tokens):
    """One graph has forward and backward. It is replayed on other tokens, with another routing."""
    weights, hidden = make_weights(dtype), make_tokens(num_tokens, dtype)
    step = functools.partial(loss_and_gradients, EVERY_BLOCK[name], hidden, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    for other in range(3):
        generator = torch.Generator(DEVICE).manual_seed(other)
        with torch.no_grad():
            hidden.normal_(generator=generator)
        graph.replay()
        got = [tensor.clone() for tensor in captured]
        assert_same_bits(got, step())


def test_training_block_never_synchronizes():
    weights, hidden = make_weights(torch.bfloat16), make_tokens(700, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in EVERY_BLOCK.values():
            # Called, recorded and replayed.
            for _ in range(4):
                loss_and_gradients(block, hidden, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_twenty_training_steps_are_bitwise_equal():
    weights, hidden = make_weights(torch.bfloat16), make_tokens(3000, torch.bfloat16)
    for block in EVERY_BLOCK.values():
        first = loss_and_gradients(block, hidden, weights)
        for _ in range(19):
            assert_same_bits(loss_and_gradients(block, hidden, weights), first)


def test_backward_in_a_thread_of_its_own():
    """loss.backward() runs in a thread that sees no context variable of the caller."""
    weights, hidden = make_weights(torch.bfloat16), make_tokens(700, torch.bfloat16)
    want = loss_and_gradients(EVERY_BLOCK["fused"], hidden, weights)[1:]
    output = EVERY_BLOCK["fused"](hidden, weights)
    output.backward(tangent_of(output))
    for leaf, gradient in zip((hidden, *weights.tensors()), want, strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, gradient)


@pytest.mark.multi_gpu
@blocks
def test_training_step_on_the_second_device(name):
    second = torch.device("cuda", 1)
    weights, hidden = make_weights(torch.bfloat16), make_tokens(700, torch.bfloat16)
    want = loss_and_gradients(EVERY_BLOCK[name], hidden, weights)
    moved = Weights(*(w.detach().to(second).requires_grad_() for w in weights.tensors()))
    assert torch.cuda.current_device() == 0
    output = EVERY_BLOCK[name](hidden.detach().to(second).requires_grad_(), moved)
    checks.assert_close(output.cpu(), want[0].cpu())
    assert torch.cuda.current_device() == 0
