# SPDX-License-Identifier: Apache-2.0
"""Export the ops of a layer of experts with adapters. moe_ops.layers.lora calls them."""

from moe_ops.ops.fused_experts_lora.op import adapted_experts as adapted_experts
from moe_ops.ops.fused_experts_lora.quantized import (
    adapted_quantized_experts as adapted_quantized_experts,
)
