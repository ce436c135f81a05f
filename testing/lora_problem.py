# SPDX-License-Identifier: Apache-2.0
"""Adapters of a projection of every expert, and the weight that they stand for."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_ops.layers.lora import LoraWeights


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
    """Both factors non-zero, unlike at the start of training, and of about the weight's size."""
    lora_a = randn(num_experts, rank, in_features, dtype=dtype, scale=in_features**-0.5)
    lora_b = randn(num_experts, out_features, rank, dtype=dtype, scale=rank**-0.5)
    return LoraWeights(lora_a.requires_grad_(), lora_b.requires_grad_(), scaling)


def merged(weight: Tensor, adapters: Iterable[LoraWeights]) -> Tensor:
    """What LoRA says the weight is, expert by expert, in fp64."""
    total = weight.double()
    for lora_a, lora_b, scaling in adapters:
        deltas = [b.double() @ a.double() for a, b in zip(lora_a, lora_b, strict=True)]
        total = total + scaling * torch.stack(deltas)
    return total
