# SPDX-License-Identifier: Apache-2.0
"""The MoE block of Llama 4 on torch.ops.moe.grouped_gemm.

T tokens, K top_k, E num_experts, H hidden_size, I intermediate_size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from moe_ops.compat import get_routing_indices, grouped_gemm, permute, unpermute
from moe_ops.compat.reference.options import check_gradients, check_tuning, gemm_options
from moe_ops.compat.reference.weights import check_equal

if TYPE_CHECKING:
    from transformers import Llama4TextConfig

    from moe_ops.configs.kernel_config import (
        KernelConfigBackward_dW,
        KernelConfigBackward_dX,
        KernelConfigForward,
    )


class Llama4GroupedGemmTextMoe(Llama4TextMoe):
    """transformers' Llama4TextMoe with a GEMM over the routed rows alone.

        router_logits = x @ router.weight.T
        s, e          = top_k of router_logits
        z_k           = (sigmoid(s_k) * x) @ experts.gate_up_proj[e_k]
        output        = shared_expert(x) + sum_k (silu(gate_k) * up_k) @ experts.down_proj[e_k]
        gate_k, up_k  = the halves of z_k

    transformers computes all experts for all tokens, with weights that are zero for all but top_k.
    The numbers, the parameters with their names and layouts, and what forward takes and returns are
    its own, so state dicts go both ways.

    Args:
        config (Llama4TextConfig): the sizes; num_experts_per_tok may be any.
        overlap_router_shared (bool): on CUDA compute the shared expert on a stream of its own, beside
            the router and the routed experts. Eager only: compiled code has one stream.
        permute_x (bool): the first GEMM gathers its rows; else permute does, before it.
        permute_y (bool): the second GEMM stores its rows in slot order; else unpermute brings them
            there, after it.
        autotune (bool): choose the kernels' configurations by shape (docs/tuning.md); nothing is
            tuned during a call.
        kernel_config_fwd, kernel_config_bwd_dW, kernel_config_bwd_dX (KernelConfigForward,
            KernelConfigBackward_dW, KernelConfigBackward_dX, or None): for both projections, with
            autotune=False.
        dW_only (bool): no gradient of the block's input is computed. Those of all weights, the
            router's and the shared expert's included, are those of a full backward.
        dX_only (bool): no gradient of any weight is computed; that of the input is the full one,
            with what comes through the router and the shared expert.

    Raises:
        ValueError: dW_only and dX_only; autotune and a kernel_config.
        TypeError: a kernel_config is that of another GEMM.

    Source: the layer of Llama 4, as transformers/models/llama4/modeling_llama4.py has it.
    """

    def __init__(
        self,
        config: Llama4TextConfig,
        overlap_router_shared: bool = True,
        permute_x: bool = True,
        permute_y: bool = True,
        autotune: bool = True,
        kernel_config_fwd: KernelConfigForward | None = None,
        kernel_config_bwd_dW: KernelConfigBackward_dW | None = None,
        kernel_config_bwd_dX: KernelConfigBackward_dX | None = None,
        dW_only: bool = False,
        dX_only: bool = False,
    ) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        name = type(self).__name__
        check_gradients(name, dW_only=dW_only, dX_only=dX_only)
        check_tuning(name, autotune, kernel_config_fwd, kernel_config_bwd_dW, kernel_config_bwd_dX)
        self.overlap_router_shared = overlap_router_shared
        self.permute_x = permute_x
        self.permute_y = permute_y
        self.autotune = autotune
        self.kernel_config_fwd = kernel_config_fwd
        self.kernel_config_bwd_dW = kernel_config_bwd_dW
        self.kernel_config_bwd_dX = kernel_config_bwd_dX
        self.dW_only = dW_only
        self.dX_only = dX_only
        # transformers leaves it to the model to fill these, whose memory is uninitialised here.
        for weight in (self.experts.gate_up_proj, self.experts.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    @torch.no_grad()
    def copy_weights(self, other: Llama4TextMoe) -> None:
        """Takes over the numbers of another block's parameters.

        Args:
            other (Llama4TextMoe): transformers' block or one of these, of the same sizes; its dtype
                and device may be others.

        Raises:
            ValueError: a parameter of `other` has another shape; nothing is then copied.
            TypeError: `other` has other parameters than a Llama4TextMoe.
        """
        pairs = self._pairs("copy_weights", other)
        for name, ours, theirs in pairs:
            if ours.shape != theirs.shape:
                caller, got = f"{type(self).__name__}.copy_weights", tuple(theirs.shape)
                expected = f"{name} of shape {tuple(ours.shape)}"
                raise ValueError(f"{caller}: expected {expected}, got {got}")
        for _, ours, theirs in pairs:
            ours.copy_(theirs)

    def check_weights(self, other: Llama4TextMoe) -> None:
        """Raises where a parameter is not that of another block, bit for bit.

        Args:
            other (Llama4TextMoe): transformers' block or one of these.

        Raises:
            ValueError: the first parameter that differs: its shape, its dtype, or in how many
                numbers, with the index of the first and both values.
            TypeError: `other` has other parameters than a Llama4TextMoe.
        """
        caller = f"{type(self).__name__}.check_weights"
        check_equal(caller, self._pairs("check_weights", other))

    def _pairs(self, method: str, other: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        ours, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if ours.keys() != theirs.keys():
            caller, got = f"{type(self).__name__}.{method}", type(other).__name__
            expected = f"other to be a Llama4TextMoe with the parameters {sorted(ours)}"
            raise TypeError(f"{caller}: expected {expected}, got a {got} with {sorted(theirs)}")
        return [(name, ours[name], theirs[name]) for name in ours]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and its router logits.

        Args:
            hidden_states ((..., H), floating): the tokens, in any number of dimensions.

        Returns:
            output ((T, H), the dtype of the shared expert's output): as transformers, without the
                leading dimensions of hidden_states.
            router_logits ((T, E), floating): for an auxiliary loss.

        Differentiable in hidden_states, unless dW_only, and every parameter, unless dX_only, from
        both results.
        """
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        if self.dW_only:
            tokens = tokens.detach()
        if self.overlap_router_shared and tokens.is_cuda and not torch.compiler.is_compiling():
            return self._overlapped(tokens)
        shared = self._shared_expert(tokens)
        router_logits, topk_weights, topk_ids = self.run_router(tokens)
        return shared + self._routed_experts(tokens, topk_weights, topk_ids), router_logits

    def _overlapped(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        current, side = torch.cuda.current_stream(tokens.device), _side_stream(tokens.device)
        # First, so that the backward comes to the routed experts first, on the caller's stream: where
        # the block is checkpointed, that is where it is computed again.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            shared = self._shared_expert(tokens)
        # Freed by the backward while the side stream still reads it, its memory is not to be reused.
        tokens.record_stream(side)
        router_logits, topk_weights, topk_ids = self.run_router(tokens)
        routed = self._routed_experts(tokens, topk_weights, topk_ids)
        current.wait_stream(side)
        shared.record_stream(current)
        return shared + routed, router_logits

    def _shared_expert(self, tokens: Tensor) -> Tensor:
        shared: Tensor
        if self.dX_only:
            detached = {name: p.detach() for name, p in self.shared_expert.named_parameters()}
            shared = functional_call(self.shared_expert, detached, (tokens,))
        else:
            shared = self.shared_expert(tokens)
        return shared

    def run_router(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's experts and their weights.

        Args:
            hidden_states ((T, H), floating): the tokens.

        Returns:
            router_logits ((T, E), floating): hidden_states @ router.weight.T.
            topk_weights ((T, K), the dtype of router_logits): the sigmoid, in fp32, of the chosen.
            topk_ids ((T, K), int64): chosen by torch.topk as in transformers, so that bf16 logits
                that tie give the same experts there and here.
        """
        weight = self.router.weight.detach() if self.dX_only else self.router.weight
        router_logits = F.linear(hidden_states, weight)
        topk_logits, topk_ids = torch.topk(router_logits, self.top_k, dim=-1)
        topk_weights = torch.sigmoid(topk_logits.float()).to(router_logits.dtype)
        return router_logits, topk_weights, topk_ids

    def _routed_experts(self, tokens: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The sum of each token's experts, (T, H)."""
        token_counts, gather_indices = get_routing_indices(topk_ids, self.num_experts)
        # A row for each slot from here on: a token's slots have other weights, so other rows.
        rows = (tokens[:, None] * topk_weights[..., None]).flatten(0, 1)
        if not self.permute_x:
            rows = permute(rows, gather_indices, 1)
        rows = self._grouped_gemm(
            rows, self.experts.gate_up_proj, token_counts, gather_indices, permute_x=self.permute_x
        )
        gate, up = rows.chunk(2, dim=-1)
        rows = self._grouped_gemm(
            self.experts.act_fn(gate) * up,
            self.experts.down_proj,
            token_counts,
            gather_indices,
            permute_y=self.permute_y,
        )
        if not self.permute_y:
            rows = unpermute(rows, gather_indices)
        return rows.view(-1, self.top_k, self.hidden_dim).sum(1)

    def _grouped_gemm(
        self,
        rows: Tensor,
        weight: Tensor,
        token_counts: Tensor,
        gather_indices: Tensor,
        permute_x: bool = False,
        permute_y: bool = False,
    ) -> Tensor:
        return grouped_gemm(
            rows,
            weight.mT,
            token_counts,
            1,
            gather_indices,
            permute_x=permute_x,
            permute_y=permute_y,
            **gemm_options(self),
        )


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all blocks: not an attribute of theirs, which would have to be copied."""
    return torch.cuda.Stream(device)
