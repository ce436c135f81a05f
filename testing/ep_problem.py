# SPDX-License-Identifier: Apache-2.0
"""One MoE layer on several ranks beside the same on one, for tests of expert parallelism.

The single process's layer sees the tokens of all ranks, in rank order. Each rank makes it too, from
the same seed, so nothing is sent to compare with.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from testing import checks

HIDDEN, INTERMEDIATE, TOP_K = 16, 24, 2


@dataclass
class Problem:
    """Tokens, a routing and a tangent of all ranks, and which are this rank's.

    hidden (N, H), ids (N, K), weights (N, K), tangent (N, H); `own` is a slice of N.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    tangent: Tensor
    own: slice

    def of_all(self) -> list[Tensor]:
        """Return hidden and weights as leaves, and the ids between them."""
        return [
            self.hidden.clone().requires_grad_(),
            self.ids,
            self.weights.clone().requires_grad_(),
        ]

    def of_rank(self) -> list[Tensor]:
        return [
            self.hidden[self.own].clone().requires_grad_(),
            self.ids[self.own].clone(),
            self.weights[self.own].clone().requires_grad_(),
        ]


def problem(
    rank: int,
    counts: list[int],
    num_experts: int,
    routing: str = "uniform",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Draw a problem in which rank r has counts[r] tokens.

    uniform: any experts. first: all tokens to the first expert. last_rank: none goes to the experts
    of the last rank. dropped: some ids name no expert.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total, start = sum(counts), sum(counts[:rank])
    likelihood = torch.rand(total, num_experts, generator=generator)
    if routing == "last_rank":
        likelihood[:, num_experts - num_experts // len(counts) :] = -1
    ids = likelihood.topk(TOP_K, 1).indices
    if routing == "first":
        ids = torch.zeros_like(ids)
        ids[:, 1] = -1
    if routing == "dropped":
        ids[::3, 0], ids[1::3, 1], ids[::5] = -1, num_experts + 3, -1
    weights = torch.rand(total, TOP_K, generator=generator, dtype=torch.float64)
    return Problem(
        draw(total, HIDDEN), ids, weights.to(torch.promote_types(dtype, torch.float32)),
        draw(total, HIDDEN), slice(start, start + counts[rank]),
    )  # fmt: skip


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def summed(gradient: Tensor) -> Tensor:
    """Return what a gradient is over all ranks: all shards, or the sum of plain ones."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    gradient = gradient.clone()
    distributed.all_reduce(gradient)
    return gradient


def step(
    layer: Callable[..., Tensor],
    inputs: list[Tensor],
    tangent: Tensor,
    parameters: Iterable[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the output of a layer and its gradients, those of hidden and weights first."""
    output = layer(*inputs)
    leaves = [inputs[0], inputs[2], *parameters]
    return output.detach(), list(torch.autograd.grad(output, leaves, tangent))


def assert_equals_one_process(
    whole: nn.Module,
    parallel: nn.Module,
    given: Problem,
    *,
    call: Callable[..., Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Hold output and all gradients of a parallel layer against those of the whole one.

    Args:
        whole: an experts module of one process.
        parallel: the same, parallel.
        given: the tokens.
        call: what is called in place of `parallel`, such as its compiled form.
        dtype: whose tolerance holds.

    Return the output and the gradients of this rank, for comparisons of bits.
    """
    trained = [(n, p) for n, p in whole.named_parameters() if p.requires_grad]
    mine = dict(parallel.named_parameters())
    want, want_grads = step(whole, given.of_all(), given.tangent, [p for _, p in trained])
    got, grads = step(
        parallel if call is None else call,
        given.of_rank(),
        given.tangent[given.own],
        [mine[n] for n, _ in trained],
    )
    own = [want[given.own], want_grads[0][given.own], want_grads[1][given.own]]
    for what, one, two in zip(("output", "hidden", "weights"), (got, *grads), own, strict=False):
        assert one.dtype == two.dtype, what
        checks.assert_close(one, two, dtype=dtype, what=what)
    for (name, parameter), gradient, expected in zip(
        trained, grads[2:], want_grads[2:], strict=True
    ):
        assert gradient.dtype == parameter.dtype, name
        checks.assert_close(summed(gradient), expected, dtype=dtype, what=name)
    return [got, *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]


def parallel_copy(module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Return a copy of a module that holds experts, spread over a mesh."""
    from moe_ops.distributed import expert_parallel

    return expert_parallel(copy.deepcopy(module), mesh, **options)
