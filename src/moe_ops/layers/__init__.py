# SPDX-License-Identifier: Apache-2.0
"""Modules made of the ops: a Mixture-of-Experts layer, its parts, and its auxiliary losses."""

from moe_ops.layers.experts import Experts, GatedMLP
from moe_ops.layers.losses import load_balancing_loss, router_z_loss, sequence_balance_loss
from moe_ops.layers.moe import MoE
from moe_ops.layers.router import Router

__all__ = [
    "Experts",
    "GatedMLP",
    "MoE",
    "Router",
    "load_balancing_loss",
    "router_z_loss",
    "sequence_balance_loss",
]
