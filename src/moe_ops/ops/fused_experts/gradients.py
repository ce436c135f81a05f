# SPDX-License-Identifier: Apache-2.0
"""Say which gradients a call of fused_experts needs, what they read, and when that is freed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """Say what the two backward ops of a call compute.

    Attributes:
        of_up: whether the gradients of hidden_states, gate_up_proj, topk_weights and gate_up_bias
            are needed from the up projection.
        of_down: whether those of z, down_proj, topk_weights and down_bias are needed from the down
            projection.
        reads_activation: whether one of them reads z.
        recomputes: whether the backward computes z again.
    """

    of_up: list[bool]
    of_down: list[bool]
    reads_activation: bool
    recomputes: bool

    @classmethod
    def of(
        cls,
        *,
        hidden_states: bool,
        topk_weights: bool,
        gate_up_bias: bool,
        down_bias: bool,
        weights_before: bool,
        recompute: str,
        gate_up_proj: bool = False,
        down_proj: bool = False,
    ) -> Gradients:
        """Tell it from the arguments whose gradients are needed. Quantised weights have none."""
        # The gradient of topk_weights comes from the projection whose rows they multiply.
        weights_in_up = topk_weights and weights_before
        weights_in_down = topk_weights and not weights_before
        of_up = [hidden_states, gate_up_proj, weights_in_up, gate_up_bias]
        of_down = [any(of_up), down_proj, weights_in_down, down_bias]
        # Of these gradients only down_bias's does not go through the activation.
        reads_activation = any(of_down[:3])
        recomputes = reads_activation and recompute == "pre_activation"
        return cls(of_up, of_down, reads_activation, recomputes)

    def kept(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        pre_activation: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return what the backward reads of these; None stands for what it does not.

        Inputs of the pre-activation that need a gradient are kept, even if the backward does not
        read them. From them the backward ops see that somebody asks for a second derivative.
        """
        need_x, need_up, weights_in_up, need_up_bias = self.of_up
        weights_in_down = self.of_down[2]
        reads_hidden_states = need_x or need_up or weights_in_up or self.recomputes
        return (
            hidden_states if reads_hidden_states else None,
            topk_weights,
            gate_up_bias if self.recomputes or need_up_bias else None,
            down_bias if weights_in_down else None,
            pre_activation if self.reads_activation and not self.recomputes else None,
        )


def forget_saved(ctx: Any) -> None:
    """Let autograd's ctx forget the tensors that it saved, unless somebody retains the graph.

    Dynamo, which traces backwards for compiled autograd, does not know how. What it compiles holds
    them to its end.
    """
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
