# SPDX-License-Identifier: Apache-2.0
"""Builds adapters of the experts' projections, and a layer that has them."""

import torch
from torch import Tensor

from moe_ops.layers.experts import Experts
from moe_ops.layers.lora import LoraExperts, LoraWeights
from testing import oracle

NUM_TOKENS, TOP_K, NUM_EXPERTS, HIDDEN, INTER = 12, 2, 4, 10, 6


def randn(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def make_adapter(
    num_experts: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype = torch.float64,
    scaling: float = 2.0,
) -> LoraWeights:
    """Return an adapter of about the weight's size. Neither factor is zero, as after some training."""
    lora_a = randn(num_experts, rank, in_features, dtype=dtype, scale=in_features**-0.5)
    lora_b = randn(num_experts, out_features, rank, dtype=dtype, scale=rank**-0.5)
    return LoraWeights(lora_a.requires_grad_(), lora_b.requires_grad_(), scaling)


def draw_ids(routing="uniform", num_tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(3)
    return oracle.random_topk_ids(routing, num_tokens, NUM_EXPERTS, TOP_K, generator)


def make_layer(num_tokens=NUM_TOKENS, rank=3, dtype=torch.float64, sizes=(HIDDEN, INTER), **flags):
    """Return a module whose adapters are not zero, and a batch for it."""
    module = LoraExperts(Experts(NUM_EXPERTS, *sizes, dtype=dtype), rank, **flags)
    randomise(module)
    x = randn(num_tokens, sizes[0], dtype=dtype).requires_grad_()
    weights = torch.rand(num_tokens, TOP_K, dtype=dtype)
    return module, x, draw_ids(num_tokens=num_tokens), weights


def randomise(module):
    for name in module.adapters:
        torch.nn.init.normal_(module.get_parameter(f"adapters.{name}.lora_B"), std=0.5)
