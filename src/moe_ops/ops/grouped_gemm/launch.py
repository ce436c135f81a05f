# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm, its dX and its dW in Triton: allocation, tile schedule, grid and launch.

In GEMM letters, as kernels.py: y (M, N) = x (M, K) @ b[e] (K, N) for the rows of each expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops.kernels.schedule import expert_offsets_kernel, tile_schedule_kernel
from moe_ops.ops.grouped_gemm.kernels import (
    _grouped_gemm_bwd_bias_dots_kernel,
    _grouped_gemm_bwd_dbias_kernel,
    _grouped_gemm_bwd_dw_kernel,
    _grouped_gemm_kernel,
)
from moe_ops.ops.launching import (
    compute_capability,
    gather_rows,
    launch_on,
    num_sms,
    refuse_bf16,
    sum_rows,
)


@dataclass(frozen=True)
class GemmConfig:
    """Block sizes of one launch; for dW block_m is the contracted one."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    group_m: int = 8

    @property
    def flatten(self) -> bool:
        """Whether the persistent loop and the loop over K become one, to overlap epilogues."""
        return self.tma


def grouped_gemm(
    input: torch.Tensor,
    weight: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    top_k: int = 1,
    permute_x: bool = False,
    permute_y: bool = False,
    kernel_config: str | None = None,
) -> torch.Tensor:
    num_rows = input.shape[0] * top_k if permute_x else input.shape[0]
    output = input.new_empty(num_rows, weight.shape[1])
    gemm = _Gemm(
        x=input,
        b=weight.transpose(1, 2),
        token_counts=token_counts,
        num_rows=num_rows,
        gather=gather_indices,
        x_divisor=top_k if permute_x else 0,
        scale=topk_weights,
        top_k=top_k,
    )
    gemm.launch(output, bias=bias, scatter_y=permute_y)
    return output


def grouped_gemm_dx(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    input: torch.Tensor | None,
    bias: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = grad_output.shape[0]
    grad_input, grad_topk_weights = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_input, grad_topk_weights
    gemm = _Gemm(
        x=grad_output,
        b=weight,
        token_counts=token_counts,
        num_rows=num_rows,
        gather=gather_indices,
        x_divisor=1 if permute_y else 0,
        scale=topk_weights,
        top_k=top_k,
        has_dots=needs[1],
    )
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2]) if needs[0] else None
    dots = gemm.new_dots(bias is not None) if needs[1] else None
    other = None if dots is None else input
    gemm.launch(grad_rows, scatter_y=permute_x, other=other, gather_other=permute_x, dots=dots)
    if grad_rows is not None:
        # In slot order, a token's rows are neighbours.
        grad_input = _sum_neighbours(grad_rows, top_k) if permute_x else grad_rows
    if dots is not None and topk_weights is not None:
        if bias is not None:
            gemm.launch_bias_dots(bias, dots[-1])
        grad_topk_weights = dots.sum(0).view(topk_weights.shape).to(topk_weights.dtype)
    return grad_input, grad_topk_weights


def grouped_gemm_dw(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    token_counts: torch.Tensor,
    gather_indices: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    needs: list[bool],
    transposed: bool,
    kernel_config: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, out_features = grad_output.shape
    num_experts = token_counts.shape[0]
    grad_weight, grad_bias = grad_output.new_empty(0), grad_output.new_empty(0)
    if not any(needs):
        return grad_weight, grad_bias
    # Rows gathered by pointer inside the GEMM would halve its speed: they are moved before it.
    g, x = grad_output, input
    if permute_y or topk_weights is not None:
        divisor = 1 if permute_y else 0
        g = gather_rows(g, gather_indices, topk_weights, top_k, divisor)
    offsets = _expert_offsets(token_counts, num_rows)
    if needs[0]:
        if permute_x:
            x = gather_rows(input, gather_indices, None, top_k, top_k)
        grad_weight = _grad_weight(g, x, offsets, transposed)
    if needs[1]:
        grad_bias = g.new_empty(num_experts, out_features)
        if grad_bias.numel() > 0:
            block_n = 128
            with launch_on(g):
                _grouped_gemm_bwd_dbias_kernel[(num_experts, triton.cdiv(out_features, block_n))](
                    g, grad_bias, offsets, num_experts, out_features, *g.stride(),
                    BLOCK_M=32, BLOCK_N=block_n,
                )  # fmt: skip
    return grad_weight, grad_bias


def _expert_offsets(token_counts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """First row and end row of each expert, int32 (2, E)."""
    num_experts = token_counts.shape[0]
    offsets = torch.empty(2, num_experts, dtype=torch.int32, device=token_counts.device)
    if num_experts > 0:
        with launch_on(token_counts):
            expert_offsets_kernel[(1,)](
                token_counts.contiguous(), offsets, num_rows, num_experts,
                EXPERTS=triton.next_power_of_2(num_experts),
            )  # fmt: skip
    return offsets


def _grad_weight(
    g: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """sum_i outer(g[i], x[i]) of each expert's rows, (E, N, D), stored (E, D, N) if transposed."""
    refuse_bf16(g)
    num_experts, num_rows = offsets.shape[1], g.shape[0]
    left, right = (x, g) if transposed else (g, x)
    sizes = (num_experts, left.shape[1], right.shape[1])
    stored = g.new_zeros(sizes) if num_rows == 0 else g.new_empty(sizes)
    if num_rows > 0 and stored.numel() > 0:
        config = _dw_config(left, right, stored)
        tiles_n = triton.cdiv(left.shape[1], config.block_n)
        tiles = num_experts * tiles_n * triton.cdiv(right.shape[1], config.block_k)
        programs = min(num_sms(g.device), tiles)
        stored_desc = None
        if config.tma:
            block = [1, config.block_n, config.block_k]
            stored_desc = TensorDescriptor.from_tensor(stored, block)
            # Seen by this thread alone: autograd's backward thread would miss a global one.
            triton.set_allocator(_allocate)
        with launch_on(g):
            _grouped_gemm_bwd_dw_kernel[(programs,)](
                left, right, stored, stored_desc, offsets, *sizes,
                *left.stride(), *right.stride(),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_k,
                GROUP=config.group_m,
                PRECISION=_precision(g.dtype), TMA=config.tma, FLATTEN=config.flatten,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return stored.transpose(1, 2) if transposed else stored


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _sum_neighbours(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T * top_k, H) -> (T, H): the sum of every top_k neighbouring rows."""
    slots = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return sum_rows(rows, slots, None, top_k)


def _dw_config(left: torch.Tensor, right: torch.Tensor, stored: torch.Tensor) -> GemmConfig:
    if left.dtype == torch.float32 or compute_capability(left.device) < (8, 0):
        return GemmConfig(32, 64, 64, num_warps=4, num_stages=3)
    if _has_tma(left, right, stored):
        return GemmConfig(64, 128, 256, num_warps=8, num_stages=3, tma=True, group_m=4)
    return GemmConfig(32, 128, 128, num_warps=8, num_stages=3)


def _config(x: torch.Tensor, rows_per_expert: float, has_tma: bool, has_dots: bool) -> GemmConfig:
    if x.dtype == torch.float32 or compute_capability(x.device) < (8, 0):
        return GemmConfig(64, 64, 32, num_warps=4, num_stages=3)
    if rows_per_expert <= 32:
        # Decoding: a few rows an expert, bound by reading the weights.
        return GemmConfig(16, 128, 128, num_warps=4, num_stages=4)
    if has_tma and has_dots:
        # The rows that x @ b is multiplied with take the registers of a wider tile.
        return GemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True)
    if has_tma:
        return GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True)
    return GemmConfig(128, 128, 32, num_warps=8, num_stages=3)


def _has_tma(*tensors: torch.Tensor) -> bool:
    """Whether descriptors can read these: Hopper or newer, 16-byte addresses and strides."""
    return compute_capability(tensors[0].device) >= (9, 0) and all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def _precision(dtype: torch.dtype) -> str:
    """How products are taken: fp32 ones as torch's own matmul precision setting says."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Gemm:
    """One grouped GEMM over the rows of all experts; b is (E, K, N) in any strides."""

    def __init__(
        self,
        x: torch.Tensor,
        b: torch.Tensor,
        token_counts: torch.Tensor,
        num_rows: int,
        gather: torch.Tensor | None,
        x_divisor: int,
        scale: torch.Tensor | None,
        top_k: int,
        has_dots: bool = False,
    ) -> None:
        refuse_bf16(x)
        self.x, self.b = x, b
        self.token_counts = token_counts.contiguous()
        self.num_rows = num_rows
        self.gather = None if gather is None else gather.contiguous()
        self.x_divisor = x_divisor
        self.scale = scale
        self.top_k = top_k
        self.num_experts, self.k, self.n = b.shape
        self.b_is_nk = b.stride(1) == 1
        self.described = b.transpose(1, 2) if self.b_is_nk else b
        read_by_tma = [self.described] if x_divisor else [self.described, x]
        has_tma = min(self.k, self.n, num_rows) > 0 and _has_tma(*read_by_tma)
        rows_per_expert = num_rows / max(self.num_experts, 1)
        self.config = _config(x, rows_per_expert, has_tma, has_dots)
        self.tiles_n = triton.cdiv(self.n, self.config.block_n)
        self.max_tiles = triton.cdiv(num_rows, self.config.block_m) + self.num_experts
        self.tiles = torch.empty(3 * self.max_tiles + 1, dtype=torch.int32, device=x.device)

    def new_dots(self, has_bias: bool) -> torch.Tensor:
        """Where the router gradient is summed up: a row per column tile, one more for the bias."""
        shape = (self.tiles_n + has_bias, self.num_rows)
        return torch.zeros(shape, dtype=torch.float32, device=self.x.device)

    def launch(
        self,
        y: torch.Tensor | None,
        *,
        bias: torch.Tensor | None = None,
        scatter_y: bool = False,
        other: torch.Tensor | None = None,
        gather_other: bool = False,
        dots: torch.Tensor | None = None,
    ) -> None:
        """Writes y[row] = scale * (x[row] @ b[e] + bias[e]), zeros in the rows of no expert.

        With `other`, also dots[column tile, slot] = <x[row] @ b[e], other[row]> of these columns.
        """
        if self.num_rows == 0 or self.num_experts == 0:
            if y is not None:
                y.zero_()
            return
        config = self.config
        programs = min(num_sms(self.x.device), self.max_tiles * self.tiles_n)
        tma_x = config.tma and not self.x_divisor
        x_desc = b_desc = None
        if tma_x:
            x_desc = TensorDescriptor.from_tensor(self.x, [config.block_m, config.block_k])
        if config.tma:
            block = [config.block_n, config.block_k]
            block = block if self.b_is_nk else block[::-1]
            b_desc = TensorDescriptor.from_tensor(self.described, [1, *block])
        with launch_on(self.x):
            # More programs than experts: all of them share the rows to zero.
            tile_schedule_kernel[(max(self.num_experts, num_sms(self.x.device)),)](
                self.token_counts, self.tiles, y, self.gather,
                self.num_rows, self.num_experts, self.max_tiles, self.n,
                BLOCK_M=config.block_m, EXPERTS=triton.next_power_of_2(self.num_experts),
                BLOCK_W=1024, ZERO_TAIL=y is not None, SCATTER=scatter_y,
            )  # fmt: skip
            if programs == 0:
                return
            _grouped_gemm_kernel[(programs,)](
                self.x, x_desc, self.b, b_desc, bias, self.scale, self.gather, y, other, dots,
                self.tiles, self.max_tiles, self.num_rows, self.n, self.k, self.top_k,
                max(self.x_divisor, 1), self.top_k if gather_other else 1,
                *self.x.stride(), *self.b.stride(), *_strides(bias), *_strides(self.scale),
                *_strides(other),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                GROUP_M=config.group_m, PRECISION=_precision(self.x.dtype),
                TMA_X=tma_x, TMA_B=config.tma, B_IS_NK=self.b_is_nk,
                EVEN_K=self.k % config.block_k == 0, GATHER_X=self.x_divisor > 0,
                SCATTER_Y=scatter_y, HAS_GATHER=self.gather is not None,
                HAS_BIAS=bias is not None, HAS_SCALE=self.scale is not None,
                STORE_Y=y is not None, HAS_DOTS=dots is not None, GATHER_OTHER=gather_other,
                FLATTEN=config.flatten,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    def launch_bias_dots(self, bias: torch.Tensor, dots: torch.Tensor) -> None:
        """Writes dots[slot] = <x[row], bias[e]>, on the schedule that `launch` made."""
        if self.num_rows == 0 or self.num_experts == 0:
            return
        with launch_on(self.x):
            _grouped_gemm_bwd_bias_dots_kernel[(self.max_tiles,)](
                self.x, self.gather, bias, dots, self.tiles, self.max_tiles, self.num_rows, self.k,
                *self.x.stride(), *bias.stride(),
                BLOCK_M=self.config.block_m, BLOCK_N=64, HAS_GATHER=self.gather is not None,
                GATHER_G=self.x_divisor > 0,
            )  # fmt: skip


def _strides(matrix: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()
