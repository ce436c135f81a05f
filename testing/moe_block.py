# SPDX-License-Identifier: Apache-2.0
"""Builds a small MoE block of the ops, to compile, export and checkpoint it.

T tokens, H hidden size, I intermediate size, E experts, K top_k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import moe_ops


@dataclass
class Weights:
    """The block's parameters, in Hugging Face's layout."""

    router: Tensor  # (E, H)
    gate_up_proj: Tensor  # (E, 2I, H)
    down_proj: Tensor  # (E, H, I)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.router, self.gate_up_proj, self.down_proj


def make_weights(
    dtype: torch.dtype = torch.float32,
    num_experts: int = 4,
    hidden_size: int = 8,
    intermediate_size: int = 6,
) -> Weights:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return values.to(dtype).requires_grad_()

    return Weights(
        parameter(num_experts, hidden_size),
        parameter(num_experts, 2 * intermediate_size, hidden_size),
        parameter(num_experts, hidden_size, intermediate_size),
    )


def make_tokens(
    num_tokens: int, dtype: torch.dtype = torch.float32, hidden_size: int = 8
) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    values = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def fused_block(hidden: Tensor, weights: Weights, top_k: int = 2, ops: Any = moe_ops) -> Tensor:
    """Compute the block with permutations and router weights inside the two grouped GEMMs.

    `ops` is moe_ops, or the oracle.
    """
    topk_weights, topk_ids = ops.topk_routing(F.linear(hidden, weights.router), top_k)
    counts, gather, _ = ops.routing_indices(topk_ids, weights.router.shape[0])
    gate_up = ops.grouped_gemm(
        hidden, weights.gate_up_proj, counts, gather, top_k=top_k, permute_x=True
    )
    slots = ops.grouped_gemm(
        swiglu(gate_up),
        weights.down_proj,
        counts,
        gather,
        topk_weights,
        top_k=top_k,
        permute_y=True,
    )
    return slots.view(-1, top_k, slots.shape[1]).sum(1)


def unfused_block(hidden: Tensor, weights: Weights, top_k: int = 2, ops: Any = moe_ops) -> Tensor:
    """Compute the block by every op: permute, two plain grouped GEMMs, weighted unpermute."""
    topk_weights, topk_ids = ops.topk_routing(F.linear(hidden, weights.router), top_k)
    counts, gather, scatter = ops.routing_indices(topk_ids, weights.router.shape[0])
    rows = ops.permute(hidden, gather, top_k, scatter)
    gate_up = ops.grouped_gemm(rows, weights.gate_up_proj, counts)
    rows = ops.grouped_gemm(swiglu(gate_up), weights.down_proj, counts)
    return ops.unpermute(rows, gather, topk_weights, top_k, scatter)


def swiglu(z: Tensor) -> Tensor:
    """Return silu(gate) * up, where gate and up are the halves of each row."""
    gate, up = z.chunk(2, -1)
    return F.silu(gate) * up


def composed_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """Return what fused_experts does, made of the ops that it fuses."""
    top_k = topk_ids.shape[1]
    counts, gather, scatter = moe_ops.routing_indices(topk_ids, gate_up_proj.shape[0])
    z = moe_ops.grouped_gemm(
        hidden_states, gate_up_proj, counts, gather, None, gate_up_bias, top_k, permute_x=True
    )
    rows = moe_ops.grouped_gemm(activation(z), down_proj, counts, bias=down_bias)
    return moe_ops.unpermute(rows, gather, topk_weights, top_k, scatter)


def experts_block(
    hidden: Tensor, weights: Weights, top_k: int = 2, ops: Any = moe_ops, **flags: Any
) -> Tensor:
    """Compute the block with the experts as one op."""
    topk_weights, topk_ids = ops.topk_routing(F.linear(hidden, weights.router), top_k)
    output: Tensor = ops.fused_experts(
        hidden, weights.gate_up_proj, weights.down_proj, topk_ids, topk_weights, **flags
    )
    return output


# Of separate ops; tests/ops/test_fused_experts.py says of the whole layer what else is said of these.
BLOCKS = {"fused": fused_block, "unfused": unfused_block}
EVERY_BLOCK = {**BLOCKS, "experts": experts_block}


def loss_and_gradients(block: Any, hidden: Tensor, weights: Weights) -> list[Tensor]:
    """Return the block's output and the gradients of its input and parameters, for a fixed tangent."""
    output = block(hidden, weights)
    tangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
    tangent = tangent.to(output.dtype).view(output.shape)
    # Without tokens the oracle's output does not depend on every weight: a zero gradient then.
    grads = torch.autograd.grad(
        output, [hidden, *weights.tensors()], tangent, allow_unused=True, materialize_grads=True
    )
    return [output, *grads]


def compiled_graphs(block: Any) -> dict[str, list[str]]:
    """Return the moe ops of the forward and the backward graph, with the shapes of their results."""
    found: dict[str, list[str]] = {}

    def record(direction: str) -> Any:
        def compiler(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
            assert direction not in found, "a graph break"
            found[direction] = [
                f"{node.target}: {describe(node.meta['val'])}"
                for node in module.graph.nodes
                if str(node.target).startswith("moe.")
            ]
            return make_boxed_func(module)

        return compiler

    def describe(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return ", ".join(describe(item) for item in value)
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    loss_and_gradients(compiled, make_tokens(3), make_weights())
    return found
