# SPDX-License-Identifier: Apache-2.0
"""Builds the MoE block of Qwen3-MoE on torch.ops.moe.grouped_gemm."""

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
    """Computes Qwen3MoeGroupedGEMMBlock with torch.ops.moe.grouped_gemm for the projections.

    The numbers are the same. No call waits for the GPU, and torch.compile(fullgraph=True) takes the
    block.

    Args:
        config, gate, gate_up_proj, down_proj: as in Qwen3MoeGroupedGEMMBlock.
        permute_x (bool): the first GEMM gathers its rows from token order. Otherwise `permute` does
            so before it.
        permute_y (bool): the second GEMM stores its rows in slot order. Otherwise `unpermute` does so
            after it.
        autotune (bool): choose the kernels' configurations by shape (docs/tuning.md). Nothing is
            tuned during a call.
        kernel_config_fwd (KernelConfigForward or None): for both GEMMs, with autotune=False.
        kernel_config_bwd_dW (KernelConfigBackward_dW or None): for the gradients of both weights.
        kernel_config_bwd_dX (KernelConfigBackward_dX or None): for the gradients of both inputs.
        dW_only (bool): compute no gradient of the block's input. All weights, the router's included,
            get the gradients of a full backward. They need the input gradient of the second
            projection, but not that of the first.
        dX_only (bool): compute no gradient of any weight, the router's included. The input gets the
            gradient of a full backward, including the part through the router.

    Raises:
        ValueError: a weight has another shape, dW_only meets dX_only, or autotune meets a
            kernel_config.
        TypeError: a kernel_config belongs to another GEMM.
        ImportError: hidden_act is not "silu", and transformers is not installed.
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
        """Make a block with copies of a transformers block's weights.

        `moe_block` is as in Qwen3MoeGroupedGEMMBlock.from_hf. Another module is a TypeError. The other
        arguments are the constructor's, with its errors.
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
        """Route as Qwen3MoeGroupedGEMMBlock does. With dX_only the weight gets no gradient."""
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
