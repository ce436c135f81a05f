# SPDX-License-Identifier: Apache-2.0
"""Modules made of the ops: a Mixture-of-Experts layer, its parts, and what trains its router."""

from moe_ops.layers.balance import load_balance_metrics, update_selection_bias_
from moe_ops.layers.experts import Experts, GatedMLP
from moe_ops.layers.losses import load_balancing_loss, router_z_loss, sequence_balance_loss
from moe_ops.layers.moe import MoE
from moe_ops.layers.router import Router

__all__ = [
    "Experts",
    "GatedMLP",
    "MoE",
    "Router",
    "load_balance_metrics",
    "load_balancing_loss",
    "router_z_loss",
    "sequence_balance_loss",
    "update_selection_bias_",
]
