# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts without merged weights, as functions and as modules."""

from moe_ops.layers.lora.functional import LoraWeights, lora_experts, lora_grouped_gemm
from moe_ops.layers.lora.modules import GroupedLora, LoraExperts

__all__ = ["GroupedLora", "LoraExperts", "LoraWeights", "lora_experts", "lora_grouped_gemm"]
