# SPDX-License-Identifier: Apache-2.0
"""Builds small MoE blocks of transformers, old and new, and steps of them and of compat's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from transformers import Llama4TextConfig, Qwen3MoeConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock

from moe_ops.compat.reference.layers.llama4_moe import Llama4GroupedGemmTextMoe
from moe_ops.compat.reference.moe_block import (
    Qwen3MoeFusedGroupedGEMMBlock,
    Qwen3MoeGroupedGEMMBlock,
)

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 32, 24, 6, 2
WEIGHTS = ("gate", "gate_up_proj", "down_proj")

# The torch block, and the fused one with each of its two permutations in a GEMM or beside it.
BLOCKS: dict[str, tuple[Any, dict[str, bool]]] = {
    "torch": (Qwen3MoeGroupedGEMMBlock, {}),
    "permute_x and permute_y": (Qwen3MoeFusedGroupedGEMMBlock, {}),
    "permute_x": (Qwen3MoeFusedGroupedGEMMBlock, {"permute_y": False}),
    "permute_y": (Qwen3MoeFusedGroupedGEMMBlock, {"permute_x": False}),
    "neither": (Qwen3MoeFusedGroupedGEMMBlock, {"permute_x": False, "permute_y": False}),
}


def qwen3_config(norm_topk_prob: bool = True) -> Qwen3MoeConfig:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN_SIZE,
        moe_intermediate_size=INTERMEDIATE_SIZE,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=norm_topk_prob,
    )
    config._experts_implementation = "eager"
    return config


def qwen3_block(norm_topk_prob: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' block, with weights that leave every stage of size 1."""
    return filled(Qwen3MoeSparseMoeBlock(qwen3_config(norm_topk_prob))).to(dtype)


def llama4_block(top_k: int = 1, num_experts: int = 4) -> Any:
    return filled(Llama4TextMoe(llama4_config(top_k, num_experts)))


def llama4_config(top_k: int = 1, num_experts: int = 4) -> Llama4TextConfig:
    return Llama4TextConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        head_dim=8,
    )


def our_llama4_block(other: Any, **options: Any) -> Llama4GroupedGemmTextMoe:
    """Return our block, with the weights of `other`."""
    block = Llama4GroupedGemmTextMoe(llama4_config(other.top_k, other.num_experts), **options)
    block.copy_weights(other)
    return block


def filled(block: Any) -> Any:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block


class Qwen3MoeListBlock(nn.Module):
    """The block of transformers before version 5, with as much of it as our block reads."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Qwen3MoeMLP(config, intermediate_size=config.moe_intermediate_size)
            for _ in range(config.num_experts)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Loop over tokens and their experts."""
        probabilities = torch.softmax(self.gate(tokens).float(), dim=-1)
        rows = []
        for row, token in zip(probabilities, tokens, strict=True):
            weights, ids = row.topk(TOP_K)
            weights = weights / weights.sum()
            experts = [self.experts[e](token) for e in ids.tolist()]
            rows.append(sum(w * y for w, y in zip(weights, experts, strict=True)))
        return torch.stack(rows)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    """Return hidden states of the given shape of tokens."""
    return torch.randn(*shape, HIDDEN_SIZE).to(dtype).requires_grad_(requires_grad)


def gradients(
    outputs: tuple[Tensor, Tensor], inputs: list[Tensor], tangents: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Return the gradients of output and router logits together."""
    flat = [o.reshape(t.shape) for o, t in zip(outputs, tangents, strict=True)]
    return list(torch.autograd.grad(flat, inputs, tangents))


def tangents_of(output: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn_like(output), torch.randn_like(router_logits)


class RecordOps(TorchDispatchMode):
    """Records which moe ops and plain products run, and the projection of each grouped GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if name.startswith("grouped_gemm"):
            # The weight, or the rows that it was multiplied with.
            in_features = args[1].shape[-1]
            name += {HIDDEN_SIZE: " up", INTERMEDIATE_SIZE: " down"}[in_features]
        if namespace == "moe" or name in {"mm", "addmm"}:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))
