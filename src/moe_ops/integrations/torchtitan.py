# SPDX-License-Identifier: Apache-2.0
"""Run the routed experts of torchtitan's models on torch.ops.moe.*.

torchtitan swaps parts of a model by overrides, which a training config names by their import path:
`--override.imports moe_ops.integrations.torchtitan.fused_experts`. Routers, shared experts,
load balancing, token dispatchers and parallelism stay torchtitan's own.

Suffixes of names, as in torchtitan: B batch, L sequence length, T = B * L tokens, D hidden_size,
F intermediate_size, E experts (under expert parallelism those of this rank), K top_k, R rows in
expert order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

import moe_ops
from moe_ops._pytorch.activation import Activation
from moe_ops.integrations.requirements import missing

MINIMUM_VERSION = "0.3"

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common import moe, token_dispatcher
    from torchtitan.overrides import fused_swiglu
except ImportError as error:
    raise missing(
        "moe_ops.integrations.torchtitan", "torchtitan", MINIMUM_VERSION, error
    ) from error

# torchtitan's w13 (E, F, 2, D) has a row of gate, then the same row of up.
_ACTIVATION = Activation("silu", interleaved=True)


class Experts(fused_swiglu.FusedGroupedExperts):  # type: ignore[misc]
    """Hold the weights of torchtitan's FusedGroupedExperts, and compute with moe ops.

    Parameters:
        w13 (E, F, 2, D): gate and up. Checkpoints have them as w1_EFD and w3_EFD.
        w2_EDF (E, D, F): the down projection.

    All is computed in bf16, as in torchtitan, with sums in fp32.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(fused_swiglu.FusedGroupedExperts.Config):  # type: ignore[misc]
        """Take the fields of torchtitan's GroupedExperts.Config."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Compute rows that a dispatcher brought into expert order.

            y = (silu(gate) * up) @ w2.T,  gate, up = x @ w1.T, x @ w3.T, of the row's expert

        Args:
            x_RD ((R, D), floating): rows in expert order.
            num_tokens_per_expert_E ((E,), int32 or int64): rows of each expert.

        Returns:
            y_RD ((R, D), dtype of x_RD): rows past the sum of the counts are zero.

        Differentiable in x_RD and the parameters. Deterministic.
        """
        gate_up, down = self.projections()
        z = moe_ops.grouped_gemm(x_RD.bfloat16(), gate_up, num_tokens_per_expert_E)
        y = moe_ops.grouped_gemm(_ACTIVATION.apply(z), down, num_tokens_per_expert_E)
        return y.type_as(x_RD)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Return this rank's gate_up_proj (E, 2 * F, D) and down_proj (E, D, F) in bf16."""
        w13, w2 = (
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in (self.w13, self.w2_EDF)
        )
        return w13.bfloat16().flatten(1, 2), w2.bfloat16()


class RoutedExperts(moe.RoutedExperts):  # type: ignore[misc]
    """Compute a layer's routed experts: as one op where no token leaves the rank.

    With expert parallelism torchtitan's dispatcher moves the tokens, and Experts.forward computes
    those that arrive.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(moe.RoutedExperts.Config):  # type: ignore[misc]
        """Take the fields of torchtitan's RoutedExperts.Config, and options of moe::fused_experts.

        Args:
            recompute: "none", or "pre_activation" to save no activation of the experts and compute
                it again in the backward. It has no effect under expert parallelism.
        """

        recompute: str = "none"

    def __init__(self, config: Config) -> None:
        """Build experts and dispatcher."""
        super().__init__(config)
        self.recompute = config.recompute

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            x_BLD ((B, L, D), floating): the tokens.
            topk_scores_BLK ((B, L, K), floating): router weight of each slot.
            topk_expert_ids_BLK ((B, L, K), int64): expert of each slot.
            num_local_tokens_per_expert_E ((E,), int64): slots of each expert.

        Returns:
            out_BLD ((B, L, D), dtype of x_BLD): summed in fp32, then rounded to bf16.

        Differentiable in x_BLD, topk_scores_BLK and the parameters. Deterministic.
        """
        if not _keeps_tokens(self.token_dispatcher):
            return super().forward(
                x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E
            )
        gate_up, down = self.inner_experts.projections()
        out_TD = moe_ops.fused_experts(
            x_BLD.flatten(0, 1).bfloat16(),
            gate_up,
            down,
            topk_expert_ids_BLK.flatten(0, 1),
            topk_scores_BLK.flatten(0, 1),
            activation=_ACTIVATION.name,
            interleaved=_ACTIVATION.interleaved,
            recompute=self.recompute,
        )
        return out_TD.type_as(x_BLD).view_as(x_BLD)


def _keeps_tokens(dispatcher: Any) -> bool:
    """Return whether a dispatcher leaves every token on its rank, as without expert parallelism."""
    if type(dispatcher) is token_dispatcher.AllToAllTokenDispatcher:
        return dispatcher.ep_mesh is None
    return type(dispatcher) is token_dispatcher.LocalTokenDispatcher


@override(  # type: ignore[untyped-decorator]
    target=moe.RoutedExperts.Config,
    description="Routed experts on torch.ops.moe.*, as one op without expert parallelism.",
)
def fused_experts(cfg: Any, *, recompute: str = "none") -> Any:
    """Replace the config of a layer's routed experts: torchtitan's override.

    Args:
        cfg: the layer's RoutedExperts.Config, with stock GroupedExperts.
        recompute: as in RoutedExperts.Config.

    Returns:
        config: a RoutedExperts.Config of this module with the same dispatcher, initialisation and
            sharding.

    Raises:
        ValueError: other experts than torchtitan's stock ones, such as gpt-oss's or those that its
            FP8 and MXFP8 converters make.
    """
    if type(cfg) is not moe.RoutedExperts.Config or (
        type(cfg.inner_experts) is not moe.GroupedExperts.Config
    ):
        raise ValueError(
            "moe_ops.integrations.torchtitan.fused_experts: expected RoutedExperts with "
            f"GroupedExperts, got {type(cfg).__qualname__} with "
            f"{type(cfg.inner_experts).__qualname__}; leave this override out of override.imports"
        )
    fused = fused_swiglu.fused_grouped_experts(cfg.inner_experts)
    experts = derive(fused, Experts.Config)
    return derive(cfg, RoutedExperts.Config, inner_experts=experts, recompute=recompute)
