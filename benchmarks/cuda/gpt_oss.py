# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's experts: biases, a clamp, gate and up by turns, and weights that are transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import moe_ops
from benchmarks.cuda.experts import Block, Implementation
from benchmarks.cuda.timing import Bench
from benchmarks.suite import Shape

LIMIT = 7.0
# So wide that the limit, which is at 3.6 times the spread of gate and up, is met now and then.
BIAS_SPREAD = 1.7


class GptOssBlock(Block):
    """A block in gpt-oss's layouts: gate_up_proj (E, H, 2I), down_proj (E, I, H), biases of both."""

    def __init__(self, bench: Bench, shape: Shape) -> None:
        super().__init__(bench, shape)
        widths = (2 * shape.intermediate_size, shape.hidden_size)
        self.gate_up_bias, self.down_bias = (
            nn.Parameter(bench.randn(shape.num_experts, width).mul_(BIAS_SPREAD))
            for width in widths
        )

    def _weight(self, projection: str) -> nn.Parameter:
        out_features, in_features = self.shape.features(projection)
        weight = self.bench.randn(self.shape.num_experts, in_features, out_features)
        return nn.Parameter(weight.mul_(in_features**-0.5))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*super().leaves, self.gate_up_bias, self.down_bias)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": "swiglu_oai", "interleaved": True, "activation_limit": LIMIT}

    def parameters(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            "gate_up_proj": leaves[1].transpose(1, 2),
            "down_proj": leaves[2].transpose(1, 2),
            "gate_up_bias": leaves[4],
            "down_bias": leaves[5],
        }


def ours(block: Block) -> Implementation:
    """fused_experts on any block's parameters."""
    parameters, options = block.parameters(block.leaves), block.options

    def forward(topk_ids: Tensor) -> Tensor:
        return moe_ops.fused_experts(
            block.hidden_states,
            topk_ids=topk_ids,
            topk_weights=block.topk_weights,
            **parameters,
            **options,
        )

    return Implementation(forward, block.leaves)


def grouped_mm_module(block: GptOssBlock) -> nn.Module:
    """transformers' GptOssExperts on the block's weights, on torch's grouped_mm."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=block.shape.hidden_size,
        intermediate_size=block.shape.intermediate_size,
        num_local_experts=block.shape.num_experts,
        num_experts_per_tok=block.shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    # Its own weights would be as large as the block's.
    with torch.device("meta"):
        module: Any = GptOssExperts(config)
    module.gate_up_proj, module.down_proj = block.gate_up_proj, block.down_proj
    module.gate_up_proj_bias, module.down_proj_bias = block.gate_up_bias, block.down_bias
    made: nn.Module = module
    return made
