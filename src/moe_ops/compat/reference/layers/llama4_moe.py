# SPDX-License-Identifier: Apache-2.0
"""Builds the MoE block of Llama 4 on torch.ops.moe.grouped_gemm.

T num_tokens, K top_k, E num_experts, H hidden_size, I intermediate_size.
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
    """Computes transformers' Llama4TextMoe with GEMMs over the routed rows alone.

        router_logits = x @ router.weight.T
        s, e          = top_k of router_logits
        z_k           = (sigmoid(s_k) * x) @ experts.gate_up_proj[e_k]
        output        = shared_expert(x) + sum_k (silu(gate_k) * up_k) @ experts.down_proj[e_k]
        gate_k, up_k  = the halves of z_k

    transformers computes all experts for all tokens, with a weight of zero for all but top_k. This block
    has the same numbers, the same parameters with their names and layouts, and the same forward
    arguments and results. State dicts go both ways.

    Args:
        config (Llama4TextConfig): the sizes, with any num_experts_per_tok.
        overlap_router_shared (bool): on CUDA compute the shared expert on a stream of its own, beside
            the router and the routed experts. Compiled code ignores this: it has one stream.
        permute_x (bool): the first GEMM gathers its rows. Otherwise `permute` does so before it.
        permute_y (bool): the second GEMM stores its rows in slot order. Otherwise `unpermute` does so
            after it.
        autotune (bool): choose the kernels' configurations by shape (docs/tuning.md). Nothing is
            tuned during a call.
        kernel_config_fwd (KernelConfigForward or None): for both projections, with autotune=False.
        kernel_config_bwd_dW (KernelConfigBackward_dW or None): for the gradients of both weights.
        kernel_config_bwd_dX (KernelConfigBackward_dX or None): for the gradients of both inputs.
        dW_only (bool): compute no gradient of the block's input. All weights, those of the router
            and the shared expert included, get the gradients of a full backward.
        dX_only (bool): compute no gradient of any weight. The input gets the gradient of a full
            backward, including the parts through the router and the shared expert.

    Raises:
        ValueError: dW_only meets dX_only, or autotune meets a kernel_config.
        TypeError: a kernel_config belongs to another GEMM.

    Source: the layer of Llama 4, as in transformers/models/llama4/modeling_llama4.py.
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
        # Their memory is uninitialised: in transformers the model fills it, not the block.
        for weight in (self.experts.gate_up_proj, self.experts.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    @torch.no_grad()
    def copy_weights(self, other: Llama4TextMoe) -> None:
        """Copy the numbers of another block's parameters.

        Args:
            other (Llama4TextMoe): transformers' block or one of these, of the same sizes. It may have
                another dtype and device.

        Raises:
            ValueError: a parameter of `other` has another shape. Nothing is copied then.
            TypeError: `other` has not the parameters of a Llama4TextMoe.
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
        """Raise if a parameter differs from that of another block in any bit.

        Args:
            other (Llama4TextMoe): transformers' block or one of these.

        Raises:
            ValueError: a parameter differs. The error names the first that does. It gives both
                shapes or dtypes, or how many numbers differ, with the index of the first and both
                values.
            TypeError: `other` has not the parameters of a Llama4TextMoe.
        """
        caller = f"{type(self).__name__}.check_weights"
        check_equal(caller, self._pairs("check_weights", other))

    def _pairs(self, method: str, other: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        ours, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if ours.keys() != theirs.keys():
            caller, got = f"{type(self).__name__}.{method}", type(other).__name__
            expected = f"other to be a Llama4TextMoe with the parameters {sorted(ours)}"
            raise TypeError(f"{caller}: expected {expected}, got {got} with {sorted(theirs)}")
        return [(name, ours[name], theirs[name]) for name in ours]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and its router logits.

        Args:
            hidden_states ((..., H), floating): the tokens, in any number of dimensions.

        Returns:
            output ((T, H), the dtype of the shared expert's output): as in transformers, without the
                leading dimensions of hidden_states.
            router_logits ((T, E), floating): for an auxiliary loss.

        Both results are differentiable in hidden_states (without dW_only) and in every parameter
        (without dX_only).
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
        # The shared expert comes first, so that the backward begins with the routed experts, on the
        # caller's stream. A checkpointed block is computed again where its backward begins.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            shared = self._shared_expert(tokens)
        # The backward may free the tokens while the side stream still reads them. Their memory must not
        # be reused until then.
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
        """Choose each token's experts and their weights.

        Args:
            hidden_states ((T, H), floating): the tokens.

        Returns:
            router_logits ((T, E), floating): hidden_states @ router.weight.T.
            topk_weights ((T, K), the dtype of router_logits): the sigmoids of the chosen logits,
                computed in fp32.
            topk_ids ((T, K), int64): chosen by torch.topk, as in transformers. Ties, which bf16 logits
                often have, then go to the same experts in both.
        """
        weight = self.router.weight.detach() if self.dX_only else self.router.weight
        router_logits = F.linear(hidden_states, weight)
        topk_logits, topk_ids = torch.topk(router_logits, self.top_k, dim=-1)
        topk_weights = torch.sigmoid(topk_logits.float()).to(router_logits.dtype)
        return router_logits, topk_weights, topk_ids

    def _routed_experts(self, tokens: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Return the sum of each token's experts, (T, H)."""
        token_counts, gather_indices = get_routing_indices(topk_ids, self.num_experts)
        # From here on each slot has a row of its own, since a token's slots differ in their weights.
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
    """Return one stream for all blocks. As an attribute it would hinder copying a block."""
    return torch.cuda.Stream(device)
