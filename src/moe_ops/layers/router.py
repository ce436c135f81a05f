# SPDX-License-Identifier: Apache-2.0
"""The router of an MoE layer."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from moe_ops import topk_routing
from moe_ops._core.autocast import is_autocast
from moe_ops._core.checks import (
    check_at_least,
    check_hidden_size,
    check_weight_dtype,
    dtype_name,
)
from moe_ops.layers.balance import update_selection_bias_

_HERE = "moe_ops.layers.Router"


class Router(nn.Module):
    """Choose each token's experts, and how much each of them counts.

        router_logits          = hidden_states @ weight.T + bias
        topk_weights, topk_ids = moe::topk_routing(router_logits, top_k, e_score_correction_bias, ...)

    The options from score_function to scaling_factor are those of moe::topk_routing
    (docs/ops/topk_routing.md). Sizes are checked when the router is made, and the other options by
    the op when it is called.

    Args:
        hidden_size (int): size of a token's hidden state.
        num_experts (int): experts to choose from.
        top_k (int): experts per token.
        bias (bool): whether the linear map has a bias (gpt-oss).
        score_function (str): "softmax" or "sigmoid".
        score_before_topk (bool): score all experts and select by score, or select by logit and
            score the selected alone.
        renormalize (bool): divide each token's weights by their sum.
        num_groups (int): groups of neighbouring experts.
        top_groups (int): groups that each token may choose from.
        group_score (str): what ranks the groups, "top2_sum" or "max".
        scaling_factor (float): multiplies the weights.
        selection_bias (bool): whether there is a buffer e_score_correction_bias, which is added to
            the scores for the selection alone (DeepSeek-V3). It begins at zero and has no gradient:
            update_selection_bias_() moves it by the experts' load.
        logits_dtype (torch.dtype or None): what the linear map is computed in; None is the dtype of
            weight. DeepSeek-V3 has fp32 here. Autocast has the last word, as in transformers.
        device, dtype: of the parameters. The buffer is made in fp32 whatever dtype is;
            module.to(dtype) casts it with the rest.

    Raises:
        ValueError: sizes that moe::topk_routing takes in no call, such as a top_k above num_experts.
        TypeError: a size that is no int; a dtype that is not a floating one of 16 bits or more.

    weight and bias begin as those of nn.Linear do, uniform in +-1 / sqrt(hidden_size).

    Source: Shazeer et al., 2017 (arXiv:1701.06538); groups and bias from DeepSeek-V3
    (arXiv:2412.19437).
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        score_function: str = "softmax",
        score_before_topk: bool = True,
        renormalize: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "top2_sum",
        scaling_factor: float = 1.0,
        selection_bias: bool = False,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_experts, top_k, num_groups, top_groups)
        if dtype is not None:
            check_weight_dtype(_HERE, dtype)
        self.top_k = top_k
        self.score_function = score_function
        self.score_before_topk = score_before_topk
        self.renormalize = renormalize
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.scaling_factor = scaling_factor
        self.logits_dtype = logits_dtype
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        # In bf16 the small steps that balance the load would be lost.
        self.register_buffer(
            "e_score_correction_bias",
            torch.empty(num_experts, device=device, dtype=torch.float32)
            if selection_bias
            else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters and the buffer, as after to_empty()."""
        bound = max(self.weight.shape[1], 1) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route each token.

        Args:
            hidden_states ((T, hidden_size), floating): one row per token.

        Returns:
            router_logits ((T, num_experts), logits_dtype or the dtype of weight): before any score.
            topk_weights ((T, top_k), fp32, or fp64 for fp64 logits): weight of each choice.
            topk_ids ((T, top_k), int32): the experts, in order of descending choice.

        Raises:
            ValueError: hidden states of another size.
            TypeError: hidden states of another dtype than weight, without autocast or logits_dtype.
            ValueError, TypeError: from moe::topk_routing, for an option or a dtype it does not take.

        router_logits and topk_weights are differentiable in hidden_states, weight and bias.
        """
        check_hidden_size(_HERE, hidden_states, self.weight.shape[1])
        router_logits = self._logits(hidden_states)
        return router_logits, *self._choose(router_logits)

    @torch.no_grad()
    def token_counts(self, router_logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Count the tokens that each expert gets, for update_selection_bias_.

            token_counts[e] = number of counted tokens that choose expert e

        The experts are chosen from the logits again, as forward chose them while the bias was the
        same: call it before update_selection_bias_. So nothing is counted twice where activation
        checkpointing computes a layer twice, and padding can be left out.

        Args:
            router_logits (Tensor (T, num_experts), floating): as forward or MoE returns them.
            attention_mask (Tensor, T elements in any shape, or None): tokens where it is zero are
                not counted.

        Returns:
            token_counts (Tensor (num_experts,), int64): add them up over the batches of a step.

        Raises:
            ValueError: logits or a mask of another shape, or an option that moe::topk_routing does
                not take.

        Not differentiable. It synchronises nothing with the host.
        """
        num_experts = self.weight.shape[0]
        if router_logits.ndim != 2 or router_logits.shape[1] != num_experts:
            raise ValueError(
                "moe_ops.layers.Router.token_counts: expected router_logits of shape (num_tokens, "
                f"num_experts ({num_experts})), got {tuple(router_logits.shape)}"
            )
        if attention_mask is not None and attention_mask.numel() != router_logits.shape[0]:
            raise ValueError(
                "moe_ops.layers.Router.token_counts: expected attention_mask to have one element "
                f"per token ({router_logits.shape[0]}), got {attention_mask.numel()}"
            )
        counted = torch.ones(1, 1, dtype=torch.bool, device=router_logits.device)
        if attention_mask is not None:
            counted = attention_mask.reshape(-1, 1).to(router_logits.device) != 0
            # Padding may be NaN.
            router_logits = router_logits.masked_fill(~counted, 0.0)
        _, topk_ids = self._choose(router_logits)
        counts = topk_ids.new_zeros(num_experts, dtype=torch.long)
        counted = counted.long().expand_as(topk_ids).flatten()
        return counts.scatter_add_(0, topk_ids.long().flatten(), counted)

    def update_selection_bias_(
        self, token_counts: Tensor, rate: float, group: distributed.ProcessGroup | None = None
    ) -> None:
        """Move the selection bias by the experts' load, in place.

        This is moe_ops.layers.update_selection_bias_ for e_score_correction_bias, with its
        arguments and errors.

        Raises:
            ValueError: a router without selection_bias.
        """
        if self.e_score_correction_bias is None:
            raise ValueError(
                "moe_ops.layers.Router.update_selection_bias_: expected a router with a selection "
                "bias, got one without; make it with selection_bias=True"
            )
        update_selection_bias_(self.e_score_correction_bias, token_counts, rate, group)

    def _choose(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        return topk_routing(
            router_logits,
            self.top_k,
            self.e_score_correction_bias,
            self.score_function,
            self.score_before_topk,
            self.renormalize,
            self.num_groups,
            self.top_groups,
            self.group_score,
            self.scaling_factor,
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        dtype = self.logits_dtype
        if dtype is None:
            given, own = hidden_states.dtype, self.weight.dtype
            if given != own and not is_autocast(hidden_states):
                raise TypeError(
                    f"{_HERE}: expected hidden_states.dtype == weight.dtype ({dtype_name(own)}), "
                    f"got {dtype_name(given)}; cast one of them, or make the router with logits_dtype"
                )
            return F.linear(hidden_states, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(hidden_states.to(dtype), self.weight.to(dtype), bias)

    def extra_repr(self) -> str:
        """Return the sizes, for print(module)."""
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"


def _check_sizes(
    hidden_size: int, num_experts: int, top_k: int, num_groups: int, top_groups: int
) -> None:
    """Refuse sizes with which moe::topk_routing takes no call.

    Raises:
        ValueError: it takes none.
    """
    check_at_least(_HERE, 0, hidden_size=hidden_size)
    check_at_least(
        _HERE, 1,
        num_experts=num_experts, top_k=top_k, num_groups=num_groups, top_groups=top_groups,
    )  # fmt: skip
    if num_experts % num_groups:
        raise ValueError(
            f"{_HERE}: expected num_experts to be a multiple of num_groups ({num_groups}), "
            f"got {num_experts}"
        )
    if top_groups > num_groups:
        raise ValueError(
            f"{_HERE}: expected top_groups <= num_groups ({num_groups}), got {top_groups}"
        )
    # Who gave no groups reads nothing about groups.
    what = "num_experts" if num_groups == 1 else "num_experts // num_groups * top_groups"
    choices = num_experts // num_groups * top_groups
    if top_k > choices:
        raise ValueError(f"{_HERE}: expected top_k <= {what} ({choices}), got {top_k}")
