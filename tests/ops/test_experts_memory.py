# SPDX-License-Identifier: Apache-2.0
"""The backward of fused_experts frees the pre-activation before it allocates the largest gradient."""

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moe_ops._core.library import OPS
from testing import checks
from testing.moe_block import Weights, experts_block, loss_and_gradients, make_tokens, make_weights

FORWARD, DOWN, UP = (
    f"fused_experts_{name}" for name in ("forward", "down_backward", "up_backward")
)


pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@dataclass
class Watch:
    """Watches the storage of each pre-activation, by kernels that are registered over the ops'.

    Attributes:
        made: the storage of z that each call of the forward returned.
        read: whether the first backward op got the newest of them, by call.
        alive: how many of them there were when the second backward op began, by call.
    """

    made: list[StorageWeakRef] = field(default_factory=list)
    read: list[bool] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def forward(self, *args: Any) -> Any:
        outputs = call(FORWARD, args)
        self.made.append(StorageWeakRef(outputs[1].untyped_storage()))
        return outputs

    def down(self, *args: Any) -> Any:
        z = args[[a.name for a in OPS[DOWN].schema.arguments].index("pre_activation")]
        self.read.append(StorageWeakRef(z.untyped_storage()) == self.made[-1])
        return call(DOWN, args)

    def up(self, *args: Any) -> Any:
        self.alive.append(sum(not storage.expired() for storage in self.made))
        return call(UP, args)


def call(name: str, args: tuple[Any, ...]) -> Any:
    return OPS[name].device_kernels["CPU"](*args)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watch the ops. The garbage collector does not run: references have to end by themselves."""
    found = Watch()
    with torch.library._scoped_library("moe", "IMPL") as library:
        for name, kernel in ((FORWARD, found.forward), (DOWN, found.down), (UP, found.up)):
            library.impl(name, kernel, "CPU", allow_override=True)
        gc.collect()
        gc.disable()
        try:
            yield found
        finally:
            gc.enable()


def checkpointed(use_reentrant: bool) -> Callable[[Tensor, Weights], Tensor]:
    def block(hidden: Tensor, weights: Weights) -> Tensor:
        def on_tensors(hidden: Tensor, *tensors: Tensor) -> Tensor:
            return experts_block(hidden, Weights(*tensors))

        return checkpoint(on_tensors, hidden, *weights.tensors(), use_reentrant=use_reentrant)

    return block


EAGER = {
    "plain": experts_block,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
}


@pytest.mark.parametrize("form", EAGER)
def test_eager_frees_it(watch, form):
    EAGER[form](make_tokens(9), make_weights()).sum().backward()
    assert watch.read == [True]
    assert watch.alive == [0]


@pytest.mark.parametrize("form", ["plain", "checkpointed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_frees_it(watch, backend, form):
    compiled = torch.compile(EAGER[form], fullgraph=True, backend=backend)
    for num_tokens in (9, 11, 12):
        found = loss_and_gradients(compiled, make_tokens(num_tokens), make_weights())
        expected = loss_and_gradients(experts_block, make_tokens(num_tokens), make_weights())
        for got, want in zip(found, expected, strict=True):
            checks.assert_close(got, want)
    assert watch.read == [True] * 6
    assert watch.alive == [0] * 6


def test_compiled_autograd_of_an_eager_forward():
    """It traces the formula. It holds what was saved to its end, and gives the same gradients."""
    hidden, weights = make_tokens(9), make_weights()
    output, *expected = loss_and_gradients(experts_block, hidden, weights)
    tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
    output = experts_block(hidden, weights)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        output.backward(tangent)
    for leaf, want in zip((hidden, *weights.tensors()), expected, strict=True):
        assert leaf.grad is not None
        checks.assert_close(leaf.grad, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_retained_graph_keeps_it(watch, compiled):
    """The second backward reads it again, and gives the same bits. A third one is refused."""
    block = torch.compile(experts_block, backend="aot_eager") if compiled else experts_block
    hidden, weights = make_tokens(9), make_weights()
    leaves = [hidden, *weights.tensors()]
    output = block(hidden, weights)
    tangent = torch.linspace(-1, 1, output.numel()).view(output.shape)
    grad = functools.partial(torch.autograd.grad, output, leaves, tangent)
    first = grad(retain_graph=True)
    second = grad()
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert watch.read == [True, True]
    assert watch.alive == [1, 0]
    with pytest.raises(RuntimeError, match="second time"):
        grad()


def test_gradients_that_are_not_needed_call_no_op(watch):
    """Where nothing below z is trained, the second op does not run."""
    hidden, weights = make_tokens(9).detach(), make_weights()
    for frozen in (weights.router, weights.gate_up_proj):
        frozen.requires_grad_(False)
    experts_block(hidden, weights).sum().backward()
    assert weights.down_proj.grad is not None
    assert watch.read == [True]
    assert watch.alive == []


def test_what_offloading_brings_back_is_freed(watch):
    copies: list[StorageWeakRef] = []

    def brought_back(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        if tensor.shape == (9 * 2, 12):
            copies.append(StorageWeakRef(copy.untyped_storage()))
        return copy

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, brought_back):
        output = experts_block(make_tokens(9), make_weights())
    # The kernel counts these too.
    watch.made = copies
    output.sum().backward()
    assert watch.read == [True]
    assert watch.alive == [0]
    assert len(copies) == 1
