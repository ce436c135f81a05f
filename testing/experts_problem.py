# SPDX-License-Identifier: Apache-2.0
"""Builds calls of fused_experts with gradients at any size, and checks them against fp64.

T tokens, K top_k, E experts, H hidden size, I intermediate size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testing import checks, oracle, reference
from testing.gemm_problem import lay_out
from testing.on_device import DEVICE
from testing.tolerances import KINK_DISTANCE

moe = torch.ops.moe

MODES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "swiglu-recompute": {"recompute": "pre_activation"},
    "gpt-oss": {
        "activation": "swiglu_oai", "interleaved": True, "activation_limit": 1.0, "bias": True,
    },
    "llama4": {"weights_before": True},
    "geglu-bias": {"activation": "gelu", "bias": True, "activation_limit": 0.7},
    "geglu-tanh-interleaved": {"activation": "gelu_tanh", "interleaved": True},
    "reglu-before-bias": {"activation": "relu", "weights_before": True, "bias": True},
    "ungated": {"activation": "silu", "gated": False},
    "ungated-squared-recompute": {
        "activation": "relu_squared", "gated": False, "bias": True, "recompute": "pre_activation",
    },
}  # fmt: skip


@dataclass
class Problem:
    """The arguments of one call, the names of those with a gradient, and the output's gradient."""

    arguments: dict[str, Any]
    differentiable: list[str]
    grad_output: Tensor

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: self.arguments[name].requires_grad_() for name in self.differentiable}
        with checks.poisoned_memory():
            output = moe.fused_experts(**{**self.arguments, **leaves})
            found = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        return output.detach(), dict(zip(leaves, found, strict=True))

    def inference(self) -> Tensor:
        with torch.no_grad(), checks.poisoned_memory():
            output: Tensor = moe.fused_experts(**self.arguments)
        return output

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        # On which side of a kink an activation lies is decided by what is stored.
        dtype = self.arguments["hidden_states"].dtype
        function = functools.partial(reference.fused_experts, rounds_to=dtype)
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
    bias: bool = False,
    device: torch.device = DEVICE,
    **flags: Any,
) -> Problem:
    num_tokens, top_k, num_experts, hidden_size, intermediate_size = shape
    generator = torch.Generator(device).manual_seed(0)
    width = intermediate_size * (2 if flags.get("gated", True) else 1)

    def randn(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    ids = reference.route(routing, num_tokens, num_experts, top_k, device)
    up = randn(num_experts, width, hidden_size, scale=hidden_size**-0.5)
    down = randn(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    arguments = {
        "hidden_states": randn(num_tokens, hidden_size),
        "gate_up_proj": lay_out(up, layout),
        "down_proj": lay_out(down, layout),
        "topk_ids": ids.to(index_dtype),
        "topk_weights": torch.rand(num_tokens, top_k, generator=generator, device=device) + 0.1,
        "gate_up_bias": randn(num_experts, width) if bias else None,
        "down_bias": randn(num_experts, hidden_size) if bias else None,
        **flags,
    }
    names = (
        "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias",
    )  # fmt: skip
    present = [name for name in names if arguments[name] is not None]
    grad_output = randn(num_tokens, hidden_size)
    # Those tokens have no gradient, so that whatever is right for them is right.
    at_kinks = reference.tokens_at_kinks(**arguments, rounds_to=dtype, distance=KINK_DISTANCE)
    assert at_kinks.sum() <= num_tokens // 3
    return Problem(arguments, present, grad_output.masked_fill(at_kinks[:, None], 0))


def check(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Hold a call and its gradients against fp64, and return them."""
    output, gradients = problem.run()
    want, want_gradients = problem.expected()
    checks.assert_rows_close(output, want, output.dtype, "output")
    assert torch.equal(problem.inference(), output), "with and without a gradient"
    for name, expected in want_gradients.items():
        got = gradients[name]
        assert got.dtype == problem.arguments[name].dtype
        if name == "topk_weights":
            # Each is a sum over a row that may cancel.
            checks.assert_close(got, expected, dtype=output.dtype, what=name)
            ids, num_experts = problem.arguments["topk_ids"], len(problem.arguments["down_proj"])
            dropped = (ids < 0) | (ids >= num_experts)
            assert (got[dropped] == 0).all(), "a dropped slot's router gradient"
        else:
            checks.assert_rows_close(got, expected, output.dtype, f"gradient of {name}")
    return output, gradients
