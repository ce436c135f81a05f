# SPDX-License-Identifier: Apache-2.0
"""Builds the MoE block of Qwen3-MoE in plain torch, with every stage to look at.

B batches of S tokens each, T = B * S tokens, K top_k, E num_experts, H hidden_size,
I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ops.compat import get_routing_indices, permute, torch_grouped_gemm, unpermute
from moe_ops.compat.reference.intermediates import MoeIntermediates
from moe_ops.compat.reference.weights import check_equal, qwen3_moe_config, qwen3_moe_weights

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig


class Qwen3MoeGroupedGEMMBlock(nn.Module):
    """Computes the sparse MoE block of Qwen3-MoE, with one torch product per expert.

        router_logits = x @ gate.T
        w, e          = top_k of softmax(router_logits), w divided by its sum with norm_topk_prob
        output        = sum_k w_k * (silu(gate_k) * up_k) @ down_proj[e_k].T
        gate_k, up_k  = the halves of x @ gate_up_proj[e_k].T

    The numbers are those of transformers' Qwen3MoeSparseMoeBlock. Use this block to compare with. It
    reads the row counts on the host, and Inductor does not compile the backward of a loop whose sizes
    are data. Compile Qwen3MoeFusedGroupedGEMMBlock instead.

    Args:
        config (Qwen3MoeConfig): sizes, num_experts_per_tok, norm_topk_prob and hidden_act.
        gate ((E, H), floating): the router's weight.
        gate_up_proj ((E, 2I, H), floating): the experts' up projections, gate rows first.
        down_proj ((E, H, I), floating): the experts' down projections.

    The tensors become the block's parameters without a copy. An nn.Parameter is registered as it is,
    and stays frozen if it is frozen.

    Raises:
        ValueError: a weight has not the shape that the config gives it.
        ImportError: hidden_act is not "silu", and transformers is not installed.

    Source: the layer of Qwen3 (arXiv:2505.09388).
    """

    # Whether the first GEMM gathers its rows, and the second scatters its output.
    permute_x = False
    permute_y = False

    def __init__(
        self, config: Qwen3MoeConfig, gate: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts: int = config.num_experts
        self.top_k: int = config.num_experts_per_tok
        self.norm_topk_prob: bool = config.norm_topk_prob
        self.hidden_size: int = config.hidden_size
        self.act_fn: Callable[[Tensor], Tensor] = _activation(config.hidden_act)
        intermediate_size, name = config.moe_intermediate_size, type(self).__name__
        for argument, tensor, sizes in (
            ("gate", gate, (self.num_experts, self.hidden_size)),
            ("gate_up_proj", gate_up_proj, (self.num_experts, 2 * intermediate_size, self.hidden_size)),
            ("down_proj", down_proj, (self.num_experts, self.hidden_size, intermediate_size)),
        ):  # fmt: skip
            if tuple(tensor.shape) != sizes:
                got = tuple(tensor.shape)
                raise ValueError(f"{name}: expected {argument} of shape {sizes}, got {got}")
        self.gate = _as_parameter(gate)
        self.gate_up_proj = _as_parameter(gate_up_proj)
        self.down_proj = _as_parameter(down_proj)

    @classmethod
    def from_hf(cls, moe_block: nn.Module) -> Qwen3MoeGroupedGEMMBlock:
        """Make a block with copies of a transformers block's weights.

        Args:
            moe_block (Qwen3MoeSparseMoeBlock): its experts are a list of MLPs (before transformers 5)
                or stacked tensors (from transformers 5 on).

        Returns:
            Qwen3MoeGroupedGEMMBlock: a block on the same device, with the same dtypes and in the same
                mode. A weight requires a gradient if moe_block's does. A stacked weight requires one
                if that of any expert does.

        Raises:
            TypeError: moe_block is no such block.
        """
        return cls._from_hf(moe_block)

    @classmethod
    def _from_hf(cls, moe_block: nn.Module, **options: Any) -> Any:
        config = qwen3_moe_config(f"{cls.__name__}.from_hf", moe_block)
        weights = {
            name: nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            for name, weight in qwen3_moe_weights(moe_block).items()
        }
        return cls(config, **weights, **options).train(moe_block.training)

    def check_weights(self, moe_block: nn.Module) -> None:
        """Raise if a weight differs from that of a transformers block in any bit.

        Args:
            moe_block (Qwen3MoeSparseMoeBlock): in either layout that from_hf takes.

        Raises:
            ValueError: a weight differs. The error names the first of gate, gate_up_proj and
                down_proj that does. It gives both shapes or dtypes, or how many numbers differ, with
                the index of the first and both values.
            TypeError: moe_block is no such block.
        """
        caller = f"{type(self).__name__}.check_weights"
        qwen3_moe_config(caller, moe_block)
        theirs = qwen3_moe_weights(moe_block)
        check_equal(caller, [(name, getattr(self, name), theirs[name]) for name in theirs])

    def forward(
        self, hidden_states: Tensor, return_intermediates: bool = False
    ) -> tuple[Tensor, Tensor] | MoeIntermediates:
        """Return the block's output and its router logits.

        Args:
            hidden_states ((B, S, H), floating): the input.
            return_intermediates (bool): return every stage instead.

        Returns:
            hidden_states ((B, S, H), the dtype of hidden_states): the output.
            router_logits ((T, E), floating): for an auxiliary loss.

        With return_intermediates it returns MoeIntermediates, which holds both and all other stages.

        Both results are differentiable in hidden_states and the three weights. Every stage is kept
        until the forward ends, even without a gradient.

        Raises:
            ValueError: hidden_states has another number of dimensions or another last size.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            name, got = type(self).__name__, tuple(hidden_states.shape)
            expected = f"hidden_states of shape (batch_size, sequence_length, {self.hidden_size})"
            raise ValueError(f"{name}: expected {expected}, got {got}")
        stages = self._stages(hidden_states)
        return stages if return_intermediates else (stages.output, stages.router_logits)

    def _stages(self, hidden_states: Tensor) -> MoeIntermediates:
        tokens = hidden_states.reshape(-1, self.hidden_size)
        router_logits, topk_weights, topk_ids = self.run_router(tokens)
        token_counts, gather_indices = self.get_token_counts_and_gather_indices(topk_ids)
        rows = tokens if self.permute_x else permute(tokens, gather_indices, self.top_k)
        first_gemm = self._first_gemm(rows, token_counts, gather_indices)
        activation = self.act_and_mul(first_gemm)
        second_gemm = self._second_gemm(activation, token_counts, gather_indices)
        unpermuted = second_gemm if self.permute_y else unpermute(second_gemm, gather_indices)
        # The view comes before the sum. After it the output would be a view, and FSDP2 warns of those.
        slots = unpermuted.view(*hidden_states.shape[:2], self.top_k, self.hidden_size)
        output = (slots * topk_weights.view(*slots.shape[:3], 1)).sum(2)
        return MoeIntermediates(
            router_logits=router_logits,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            token_counts=token_counts,
            gather_indices=gather_indices,
            first_gemm=first_gemm,
            activation=activation,
            second_gemm=second_gemm,
            unpermuted=unpermuted,
            # Under autocast the experts' output has another dtype.
            output=output.to(hidden_states.dtype),
        )

    def run_router(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose each token's experts and their weights.

        Args:
            hidden_states ((T, H), floating): the tokens.

        Returns:
            router_logits ((T, E), floating): hidden_states @ gate.T.
            topk_weights ((T, K), the dtype of router_logits): computed in fp32.
            topk_ids ((T, K), int64): chosen by torch.topk, as in transformers. Ties, which bf16 logits
                often have, then go to the same experts in both.
        """
        return self._route(hidden_states, self.gate)

    def _route(self, hidden_states: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = F.linear(hidden_states, gate)
        probabilities = F.softmax(router_logits, dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(probabilities, self.top_k, dim=-1)
        if self.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return router_logits, topk_weights.to(router_logits.dtype), topk_ids

    def get_token_counts_and_gather_indices(self, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Count each expert's rows and sort the slots by expert.

        Args:
            topk_ids ((T, K), int32 or int64): expert of each slot.

        Returns:
            token_counts ((E,), int64): rows of each expert.
            gather_indices ((T * K,), int64): slot of each row in expert order.
        """
        return get_routing_indices(topk_ids, self.num_experts)

    def act_and_mul(self, x: Tensor) -> Tensor:
        """Return act(gate) * up for rows that hold gate and up: (R, 2I) becomes (R, I)."""
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _first_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return torch_grouped_gemm(rows, self.gate_up_proj, token_counts)

    def _second_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return torch_grouped_gemm(rows, self.down_proj, token_counts)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return transformers' function of that name. Qwen3's own, silu, needs no transformers."""
    if name == "silu":
        return F.silu
    from transformers.activations import ACT2FN

    activation: Callable[[Tensor], Tensor] = ACT2FN[name]
    return activation


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
