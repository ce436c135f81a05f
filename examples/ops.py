# SPDX-License-Identifier: Apache-2.0
"""Train experts made of torch.ops.moe.* ops, compiled, to imitate other experts.

Run it: python examples/ops.py
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, silu

import moe_ops

device = "cuda" if torch.cuda.is_available() else "cpu"
num_tokens, hidden_size, intermediate_size, num_experts, top_k = 256, 32, 64, 8, 2


def fused(x: Tensor, router: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Route each token to top_k experts and compute these with one op."""
    topk_weights, topk_ids = moe_ops.topk_routing(x @ router.T, top_k, renormalize=True)
    return moe_ops.fused_experts(x, gate_up_proj, down_proj, topk_ids, topk_weights)


def separate(x: Tensor, router: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Compute the same with separate ops, which leave room for your own code between them."""
    topk_weights, topk_ids = moe_ops.topk_routing(x @ router.T, top_k, renormalize=True)
    token_counts, gather_indices, scatter_indices = moe_ops.routing_indices(topk_ids, num_experts)
    # permute_x: the GEMM reads the tokens where they are and writes rows in the order of experts.
    gate, up = moe_ops.grouped_gemm(
        x, gate_up_proj, token_counts, gather_indices, top_k=top_k, permute_x=True
    ).chunk(2, dim=-1)
    rows = moe_ops.grouped_gemm(silu(gate) * up, down_proj, token_counts)
    return moe_ops.unpermute(rows, gather_indices, topk_weights, top_k, scatter_indices)


def random_weights() -> list[Tensor]:
    up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    shapes = (num_experts, hidden_size), (num_experts, *up), (num_experts, *down)
    return [torch.randn(shape, device=device) * shape[-1] ** -0.5 for shape in shapes]


torch.manual_seed(0)
x = torch.randn(num_tokens, hidden_size, device=device)
target, initial_weights = fused(x, *random_weights()), random_weights()
for experts in (fused, separate):
    compiled = torch.compile(experts, fullgraph=True)
    weights = [weight.clone().requires_grad_() for weight in initial_weights]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = mse_loss(compiled(x, *weights), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{experts.__name__:9} loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if not losses[-1] < losses[0] / 2:
        sys.exit("the loss did not fall to half")
