# SPDX-License-Identifier: Apache-2.0
"""Builds calls of grouped_gemm at any size, and checks them against fp64.

T tokens, K top_k, R = T * K rows, E experts, N out_features, D in_features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testing import checks, oracle, reference
from testing.on_device import DEVICE

moe = torch.ops.moe

# T, K, E, N, D: many rows an expert, then few. Widths that blocks divide, that descriptors can read
# but no block divides (704, 96, 2880), and that no descriptor can read (odd, or not 16 bytes).
SHAPES = {
    "even": (1000, 2, 4, 512, 256),
    "gptoss": (700, 4, 8, 2880, 96),
    "gptoss-down": (700, 2, 4, 96, 2880),
    "moonlight": (900, 3, 6, 704, 160),
    "odd": (801, 2, 5, 129, 257),
    "odd-n": (600, 2, 3, 100, 64),
    "odd-d": (600, 2, 3, 64, 100),
    "one-expert": (300, 1, 1, 200, 136),
    "decode": (6, 4, 32, 256, 512),
    "decode-odd": (3, 2, 8, 67, 131),
    "narrow": (700, 2, 4, 1, 1),
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-weights-bias": {"weights": True, "bias": True},
    "permute_x": {"permute_x": True},
    "permute_x-weights-bias": {"permute_x": True, "weights": True, "bias": True},
    "permute_y-weights": {"permute_y": True, "weights": True},
    "permute_y-weights-bias": {"permute_y": True, "weights": True, "bias": True},
}


@dataclass
class Problem:
    """The arguments of one call, the names of those with a gradient, and the output's gradient."""

    arguments: dict[str, Any]
    differentiable: list[str]
    grad_output: Tensor
    name: str = "grouped_gemm"

    def leaves(self) -> dict[str, Tensor]:
        return {name: self.arguments[name].requires_grad_() for name in self.differentiable}

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = self.leaves()
        with checks.poisoned_memory():
            output = getattr(moe, self.name)(**{**self.arguments, **leaves})
            found = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        return output.detach(), dict(zip(leaves, found, strict=True))

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        function = getattr(reference, self.name)
        output = function(**self.arguments).detach()
        call = (self.arguments, self.differentiable, self.grad_output)
        return output, oracle.gradients(function, *call)


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    routing: str = "uniform",
    layout: str = "contiguous",
    index_dtype: torch.dtype = torch.int32,
    permute_x: bool = False,
    permute_y: bool = False,
    weights: bool = False,
    bias: bool = False,
    poison: bool = True,
    ids: Tensor | None = None,
    device: torch.device = DEVICE,
) -> Problem:
    """Return a call whose rows of no expert hold NaN, unless told not to: nothing may read them.

    The tokens go to the experts `ids` (T, K) where these are given, else as `routing` says.
    """
    num_tokens, top_k, num_experts, out_features, in_features = shape
    num_rows = num_tokens * top_k
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(as_dtype)

    if ids is None:
        ids = reference.route(routing, num_tokens, num_experts, top_k, device)
    counts, gather, _ = reference.routing_indices(ids, num_experts)
    dropped_rows = torch.arange(num_rows, device=device) >= counts.sum()
    dropped_slots = torch.zeros_like(dropped_rows)
    dropped_slots[gather[dropped_rows].long()] = True

    rows = randn(num_tokens if permute_x else num_rows, in_features)
    grad_output = randn(num_rows, out_features)
    topk_weights = torch.rand(num_tokens, top_k, generator=generator, device=device) + 0.1
    if poison:
        unread = dropped_slots.view(-1, top_k).all(1) if permute_x else dropped_rows
        rows[unread] = float("nan")
        grad_output[dropped_slots if permute_y else dropped_rows] = float("nan")
        topk_weights[dropped_slots.view(-1, top_k)] = float("nan")
    arguments = {
        "input": rows,
        "weight": lay_out(randn(num_experts, out_features, in_features), layout),
        "token_counts": counts.to(index_dtype),
        "gather_indices": gather.to(index_dtype),
        "topk_weights": topk_weights if weights else None,
        "bias": randn(num_experts, out_features) if bias else None,
        "top_k": top_k,
        "permute_x": permute_x,
        "permute_y": permute_y,
    }
    names = ("input", "weight", "topk_weights", "bias")
    return Problem(arguments, [n for n in names if arguments[n] is not None], grad_output)


def lay_out(weight: Tensor, layout: str) -> Tensor:
    """Return the same weight (E, N, D) stored as (E, D, N), with room between rows, or as (N, D, E)."""
    if layout == "transposed":
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        num_experts, out_features, in_features = weight.shape
        room = weight.new_full((num_experts, out_features + 3, in_features + 8), float("nan"))
        return room[:, :out_features, :in_features].copy_(weight)
    if layout == "expert-last":
        return weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return weight


def check(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Hold a call and its gradients against fp64, and return them."""
    output, gradients = problem.run()
    want, want_gradients = problem.expected()
    dtype = dtype or output.dtype
    checks.assert_rows_close(output, want, dtype, "output")
    for name, expected in want_gradients.items():
        got = gradients[name]
        assert got.dtype == problem.arguments[name].dtype
        if name == "topk_weights":
            # Each is a sum over a row that may cancel.
            checks.assert_close(got, expected, dtype=dtype, what=name)
            assert ((expected != 0) | (got == 0)).all(), "a dropped slot's router gradient"
        else:
            checks.assert_rows_close(got, expected, dtype, f"gradient of {name}")
    return output, gradients
