# SPDX-License-Identifier: Apache-2.0
"""The MoE block of Qwen3-MoE in plain torch, with every stage to look at.

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
    """The sparse MoE block of Qwen3-MoE, its experts one torch product after the other.

        router_logits = x @ gate.T
        w, e          = top_k of softmax(router_logits), w divided by its sum with norm_topk_prob
        output        = sum_k w_k * (silu(gate_k) * up_k) @ down_proj[e_k].T
        gate_k, up_k  = the halves of x @ gate_up_proj[e_k].T

    The numbers are those of transformers' Qwen3MoeSparseMoeBlock. This is the block to compare with:
    the counts of rows are read on the host, and Inductor does not compile the backward of a loop
    whose sizes are data. For torch.compile there is Qwen3MoeFusedGroupedGEMMBlock.

    Args:
        config (Qwen3MoeConfig): sizes, num_experts_per_tok, norm_topk_prob and hidden_act.
        gate ((E, H), floating): the router's weight.
        gate_up_proj ((E, 2I, H), floating): the experts' up projections, gate rows first.
        down_proj ((E, H, I), floating): the experts' down projections.

    The tensors become the block's parameters and are not copied; an nn.Parameter is registered as
    it is, so one that is frozen stays so.

    Raises:
        ValueError: a weight has another shape than the config says.
        ImportError: transformers is not installed, and hidden_act is another than "silu".

    Source: the layer of Qwen3 (arXiv:2505.09388).
    """

    # Whether a GEMM moves rows between token order and expert order itself.
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
        """A block with copies of a transformers block's weights.

        Args:
            moe_block (Qwen3MoeSparseMoeBlock): its experts are a list of MLPs, as before
                transformers 5, or stacked tensors, as since then.

        Returns:
            Qwen3MoeGroupedGEMMBlock: on the same device, in the same dtypes, in the same mode. A
                weight is trained where moe_block trains it or, of a list, any of its parts.

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
        """Raises where a weight is not that of a transformers block, bit for bit.

        Args:
            moe_block (Qwen3MoeSparseMoeBlock): in either layout, as from_hf takes it.

        Raises:
            ValueError: the first weight, of gate, gate_up_proj and down_proj, that differs: its
                shape, its dtype, or in how many numbers, with the index of the first and both values.
            TypeError: moe_block is no such block.
        """
        caller = f"{type(self).__name__}.check_weights"
        qwen3_moe_config(caller, moe_block)
        theirs = qwen3_moe_weights(moe_block)
        check_equal(caller, [(name, getattr(self, name), theirs[name]) for name in theirs])

    def forward(
        self, hidden_states: Tensor, return_intermediates: bool = False
    ) -> tuple[Tensor, Tensor] | MoeIntermediates:
        """The block's output and its router logits.

        Args:
            hidden_states ((B, S, H), floating): the input.
            return_intermediates (bool): return every stage instead.

        Returns:
            hidden_states ((B, S, H), the dtype of hidden_states): the output.
            router_logits ((T, E), floating): for an auxiliary loss.

        or, with return_intermediates, MoeIntermediates, which has both and the stages between.

        Differentiable in hidden_states and the three weights, from both results. Without a
        gradient too, every stage is kept until the forward ends.

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
        # In the input's shape before the sum, not after it: FSDP2 warns of outputs that are views.
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
            # Under autocast the experts compute in another dtype.
            output=output.to(hidden_states.dtype),
        )

    def run_router(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's experts and their weights.

        Args:
            hidden_states ((T, H), floating): the tokens.

        Returns:
            router_logits ((T, E), floating): hidden_states @ gate.T.
            topk_weights ((T, K), the dtype of router_logits): computed in fp32.
            topk_ids ((T, K), int64): chosen by torch.topk as in transformers, so that bf16 logits
                that tie give the same experts there and here.
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
        """How many rows each expert gets, and from which slots.

        Args:
            topk_ids ((T, K), int32 or int64): expert of each slot.

        Returns:
            token_counts ((E,), int64): rows of each expert.
            gather_indices ((T * K,), int64): slot of each row in expert order.
        """
        return get_routing_indices(topk_ids, self.num_experts)

    def act_and_mul(self, x: Tensor) -> Tensor:
        """act(gate) * up of rows that hold gate and up: (R, 2I) to (R, I)."""
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _first_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return torch_grouped_gemm(rows, self.gate_up_proj, token_counts)

    def _second_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return torch_grouped_gemm(rows, self.down_proj, token_counts)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """transformers' function of that name; that of Qwen3 itself needs no transformers."""
    if name == "silu":
        return F.silu
    from transformers.activations import ACT2FN

    activation: Callable[[Tensor], Tensor] = ACT2FN[name]
    return activation


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
