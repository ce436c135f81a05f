# SPDX-License-Identifier: Apache-2.0
"""The op fused_experts."""

from moe_ops.ops.fused_experts.op import fused_experts as fused_experts
