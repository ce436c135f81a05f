# SPDX-License-Identifier: Apache-2.0
"""The MoE block of Qwen3-MoE on torch.ops.moe.grouped_gemm.

K top_k, E num_experts, H hidden_size,
I intermediate_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moe_ops.compat import grouped_gemm
from moe_ops.compat.reference.intermediates import MoeIntermediates
from moe_ops.compat.reference.layers.qwen3_moe import Qwen3MoeGroupedGEMMBlock
from moe_ops.compat.reference.options import check_gradients, check_tuning, gemm_options
from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig

__all__ = ["Qwen3MoeFusedGroupedGEMMBlock", "Qwen3MoeGroupedGEMMBlock"]


class Qwen3MoeFusedGroupedGEMMBlock(Qwen3MoeGroupedGEMMBlock):
    """Qwen3MoeGroupedGEMMBlock with torch.ops.moe.grouped_gemm for its projections.

    The numbers are the same. Nothing synchronises with a GPU, and torch.compile(fullgraph=True)
    takes it.

    Args:
        config, gate, gate_up_proj, down_proj: as in Qwen3MoeGroupedGEMMBlock.
        permute_x (bool): the first GEMM gathers its rows from token order; else permute does, before
            it.
        permute_y (bool): the second GEMM stores its rows in slot order; else unpermute brings them
            there, after it.
        autotune (bool): choose the kernels' configurations by shape (docs/tuning.md); nothing is
            tuned during a call.
        kernel_config_fwd (KernelConfigForward or None): for both GEMMs, with autotune=False.
        kernel_config_bwd_dW (KernelConfigBackward_dW or None): for the gradients of both weights.
        kernel_config_bwd_dX (KernelConfigBackward_dX or None): for the gradients of both inputs.
        dW_only (bool): no gradient of the block's input is computed. Those of all weights, the
            router's included, are those of a full backward, for which the second projection's
            input gradient is computed too; the first one's is not.
        dX_only (bool): no gradient of any weight is computed, the router's included, which is one
            of them; that of the input is the full one, with what comes through the router.

    Raises:
        ValueError: a weight of another shape; dW_only and dX_only; autotune and a kernel_config.
        TypeError: a kernel_config is that of another GEMM.
        ImportError: transformers is not installed, and hidden_act is another than "silu".
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        gate: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        permute_x: bool = True,
        permute_y: bool = True,
        autotune: bool = True,
        kernel_config_fwd: KernelConfigForward | None = None,
        kernel_config_bwd_dW: KernelConfigBackward_dW | None = None,
        kernel_config_bwd_dX: KernelConfigBackward_dX | None = None,
        dW_only: bool = False,
        dX_only: bool = False,
    ) -> None:
        super().__init__(config, gate, gate_up_proj, down_proj)
        name = type(self).__name__
        check_gradients(name, dW_only=dW_only, dX_only=dX_only)
        check_tuning(
            name,
            autotune,
            kernel_config_fwd=kernel_config_fwd,
            kernel_config_bwd_dW=kernel_config_bwd_dW,
            kernel_config_bwd_dX=kernel_config_bwd_dX,
        )
        self.permute_x = permute_x
        self.permute_y = permute_y
        self.autotune = autotune
        self.kernel_config_fwd = kernel_config_fwd
        self.kernel_config_bwd_dW = kernel_config_bwd_dW
        self.kernel_config_bwd_dX = kernel_config_bwd_dX
        self.dW_only = dW_only
        self.dX_only = dX_only

    @classmethod
    def from_hf(
        cls,
        moe_block: nn.Module,
        permute_x: bool = True,
        permute_y: bool = True,
        autotune: bool = True,
        kernel_config_fwd: KernelConfigForward | None = None,
        kernel_config_bwd_dW: KernelConfigBackward_dW | None = None,
        kernel_config_bwd_dX: KernelConfigBackward_dX | None = None,
        dW_only: bool = False,
        dX_only: bool = False,
    ) -> Qwen3MoeFusedGroupedGEMMBlock:
        """A block with copies of a transformers block's weights.

        `moe_block` is taken as by Qwen3MoeGroupedGEMMBlock.from_hf, in both layouts; the other
        arguments are the constructor's, which raises for them. What is no such block is a TypeError.
        """
        return cls._from_hf(
            moe_block,
            permute_x=permute_x,
            permute_y=permute_y,
            autotune=autotune,
            kernel_config_fwd=kernel_config_fwd,
            kernel_config_bwd_dW=kernel_config_bwd_dW,
            kernel_config_bwd_dX=kernel_config_bwd_dX,
            dW_only=dW_only,
            dX_only=dX_only,
        )

    def run_router(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in Qwen3MoeGroupedGEMMBlock; with dX_only the weight gets no gradient."""
        return self._route(hidden_states, self.gate.detach() if self.dX_only else self.gate)

    def _stages(self, hidden_states: Tensor) -> MoeIntermediates:
        return super()._stages(hidden_states.detach() if self.dW_only else hidden_states)

    def _first_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return self._grouped_gemm(
            rows, self.gate_up_proj, token_counts, gather_indices, permute_x=self.permute_x
        )

    def _second_gemm(self, rows: Tensor, token_counts: Tensor, gather_indices: Tensor) -> Tensor:
        return self._grouped_gemm(
            rows, self.down_proj, token_counts, gather_indices, permute_y=self.permute_y
        )

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
            weight,
            token_counts,
            self.top_k,
            gather_indices,
            permute_x=permute_x,
            permute_y=permute_y,
            **gemm_options(self),
        )
