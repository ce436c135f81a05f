# SPDX-License-Identifier: Apache-2.0
"""Export the op fused_experts, and those with adapters that moe_ops.layers.lora calls."""

from moe_ops.ops.fused_experts.lora import adapted_experts as adapted_experts
from moe_ops.ops.fused_experts.lora_quantized import (
    adapted_quantized_experts as adapted_quantized_experts,
)
from moe_ops.ops.fused_experts.op import fused_experts as fused_experts
