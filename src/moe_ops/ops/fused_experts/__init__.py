# SPDX-License-Identifier: Apache-2.0
"""Export the op fused_experts."""

from moe_ops.ops.fused_experts.op import fused_experts as fused_experts
