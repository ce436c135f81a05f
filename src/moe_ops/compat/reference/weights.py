# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of transformers' MoE blocks, and finds where they differ from ours.

E num_experts, H hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def qwen3_moe_config(caller: str, moe_block: nn.Module) -> Any:
    """Return the Qwen3MoeConfig of a Qwen3MoeSparseMoeBlock. Only its experts keep it."""
    experts = getattr(moe_block, "experts", None)
    if isinstance(experts, nn.ModuleList) and len(experts):
        experts = experts[0]
    config = getattr(experts, "config", None)
    if config is None:
        got = type(moe_block).__name__
        expected = "moe_block to be a Qwen3MoeSparseMoeBlock, whose experts have a config"
        raise TypeError(f"{caller}: expected {expected}, got {got}")
    return config


def qwen3_moe_weights(moe_block: nn.Module) -> dict[str, Tensor]:
    """Return gate (E, H), gate_up_proj (E, 2I, H) and down_proj (E, H, I) of a Qwen3MoeSparseMoeBlock.

    Before transformers 5 the experts are a ModuleList of MLPs, and this function stacks their weights.
    From transformers 5 on they are stacked already, and are returned as they are.
    """
    gate: Any = moe_block.get_submodule("gate")
    experts: Any = moe_block.get_submodule("experts")
    if isinstance(experts, nn.ModuleList):
        mlps: list[Any] = list(experts)
        # The gate's rows come first: the activation splits them so.
        gate_up_proj = torch.stack(
            [torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in mlps]
        )
        down_proj = torch.stack([mlp.down_proj.weight for mlp in mlps])
    else:
        gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    return {"gate": gate.weight, "gate_up_proj": gate_up_proj, "down_proj": down_proj}


def check_equal(caller: str, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raise ValueError at the first pair of tensors that differ in shape, dtype or a number.

    Args:
        caller (str): the class and the method, for the error.
        pairs (iterable of (name, ours, theirs)): the tensors to compare. Two NaN are equal.
    """
    for name, ours, theirs in pairs:
        for what in ("shape", "dtype"):
            wanted, found = getattr(theirs, what), getattr(ours, what)
            if found != wanted:
                wanted, found = _plain(wanted), _plain(found)
                raise ValueError(f"{caller}: expected {name} of {what} {wanted}, got {found}")
        got, expected = ours.detach(), theirs.detach().to(ours.device)
        differs = (got != expected) & ~(got.isnan() & expected.isnan())
        places = differs.nonzero()
        if len(places):
            first = tuple(places[0].tolist())
            raise ValueError(
                f"{caller}: {name} differs in {len(places)} of {got.numel()} numbers, first in "
                f"{name}{list(first)}: expected {expected[first].item()}, got {got[first].item()}"
            )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
