# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm, its dX and its dW in Triton: allocation, tile schedule, grid and launch.

In GEMM letters, as kernels.py: y (M, N) = x (M, K) @ b[e] (K, N) for the rows of each expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, cast

import torch
from triton.runtime.errors import OutOfResources
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ops.configs.choose import Problem, choose, device_of, rows_bucket
from moe_ops.configs.kernel_config import (
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.kernels.schedule import expert_offsets_kernel, tile_schedule_kernel
from moe_ops.ops.grouped_gemm.kernels import (
    _grouped_gemm_bwd_bias_dots_kernel,
    _grouped_gemm_bwd_dbias_kernel,
    _grouped_gemm_bwd_dw_kernel,
    _grouped_gemm_kernel,
)
from moe_ops.ops.launching import (
    cdiv,
    gather_rows,
    launch_on,
    next_power_of_2,
    refuse_bf16,
    sum_rows,
)

# Row tiles of at most so many rows find their place themselves: a schedule is one launch more.
_FINDS_TILES_ROWS = 32


@dataclass(frozen=True)
class _Tiling:
    """A forward's or a dX's configuration in the kernel's letters: y (M, N) = x (M, K) @ b (K, N)."""

    config: KernelConfig
    block_m: int
    block_n: int
    block_k: int
    tail_tiles: bool
    tma_x: bool
    tma_b: bool

    @staticmethod
    def of(config: KernelConfig) -> _Tiling:
        m, n, k = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
        if isinstance(config, KernelConfigBackward_dX):
            x, w = config.use_tma_load_dy, config.use_tma_load_w
            return _Tiling(config, m, k, n, config.tail_tiles, x, w)
        config = cast(KernelConfigForward, config)
        x, w = config.use_tma_load_x, config.use_tma_load_w
        return _Tiling(config, m, n, k, config.tail_tiles, x, w)


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
        "forward",
        x=input,
        b=weight.transpose(1, 2),
        token_counts=token_counts,
        num_rows=num_rows,
        gather=gather_indices,
        x_divisor=top_k if permute_x else 0,
        scale=topk_weights,
        top_k=top_k,
        scatter_y=permute_y,
        has_bias=bias is not None,
        kernel_config=kernel_config,
    )
    gemm.launch(output, bias=bias)
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
        "backward_dX",
        x=grad_output,
        b=weight,
        token_counts=token_counts,
        num_rows=num_rows,
        gather=gather_indices,
        x_divisor=1 if permute_y else 0,
        scale=topk_weights,
        top_k=top_k,
        scatter_y=permute_x,
        has_dots=needs[1],
        kernel_config=kernel_config,
    )
    grad_rows = grad_output.new_empty(num_rows, weight.shape[2]) if needs[0] else None
    dots = gemm.new_dots(bias is not None) if needs[1] else None
    other = None if dots is None else input
    gemm.launch(grad_rows, other=other, gather_other=permute_x, dots=dots)
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
        grad_weight = _grad_weight(g, x, offsets, transposed, kernel_config)
    if needs[1]:
        grad_bias = g.new_empty(num_experts, out_features)
        if grad_bias.numel() > 0:
            block_n = 128
            with launch_on(g):
                _grouped_gemm_bwd_dbias_kernel[(num_experts, cdiv(out_features, block_n))](
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
                EXPERTS=next_power_of_2(num_experts),
            )  # fmt: skip
    return offsets


def _grad_weight(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    transposed: bool,
    kernel_config: str | None,
) -> torch.Tensor:
    """sum_i outer(g[i], x[i]) of each expert's rows, (E, N, D), stored (E, D, N) if transposed."""
    refuse_bf16(g)
    num_experts, num_rows = offsets.shape[1], g.shape[0]
    left, right = (x, g) if transposed else (g, x)
    sizes = (num_experts, left.shape[1], right.shape[1])
    stored = g.new_zeros(sizes) if num_rows == 0 else g.new_empty(sizes)
    if num_rows > 0 and stored.numel() > 0:
        problem = Problem(
            "backward_dW", _name(g.dtype), num_experts, g.shape[1], x.shape[1],
            rows_bucket(num_rows, num_experts), ("transposed",) if transposed else (),
        )  # fmt: skip
        device = device_of(g.device)
        config = cast(KernelConfigBackward_dW, choose(problem, device, kernel_config))
        block_m, block_left, block_right = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
        tma_left, tma_right = config.use_tma_load_dy, config.use_tma_load_x
        if transposed:
            block_left, block_right = block_right, block_left
            tma_left, tma_right = tma_right, tma_left
        tma_left = tma_left and _has_tma(left)
        tma_right = tma_right and _has_tma(right)
        tma_stored = config.use_tma_store and _has_tma(stored)
        tiles_left = cdiv(left.shape[1], block_left)
        tiles = num_experts * tiles_left * cdiv(right.shape[1], block_right)
        block = [1, block_left, block_right]
        programs = min(device.num_sms * config.programs_per_sm, tiles)
        try:
            with launch_on(g):
                _grouped_gemm_bwd_dw_kernel[(programs,)](
                    left, create_ragged_descriptor(left, [block_m, block_left]) if tma_left else None,
                    right, create_ragged_descriptor(right, [block_m, block_right]) if tma_right else None,
                    stored, TensorDescriptor.from_tensor(stored, block) if tma_stored else None,
                    offsets, *sizes, *left.stride(), *right.stride(),
                    BLOCK_M=block_m, BLOCK_N=block_left, BLOCK_D=block_right, GROUP=config.group_m,
                    PRECISION=_precision(g.dtype), TMA_G=tma_left, TMA_X=tma_right, TMA_DW=tma_stored,
                    FLATTEN=config.flatten,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        except OutOfResources as error:
            _refuse_too_large(error, kernel_config)
    return stored.transpose(1, 2) if transposed else stored


def _sum_neighbours(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T * top_k, H) -> (T, H): the sum of every top_k neighbouring rows."""
    slots = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return sum_rows(rows, slots, None, top_k)


def _has_tma(tensor: torch.Tensor) -> bool:
    """Whether a descriptor can read it: Hopper or newer, 16-byte address and strides."""
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    return (
        device_of(tensor.device).has_tma
        and inner == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in outer)
    )


def _refuse_too_large(error: OutOfResources, kernel_config: str | None) -> NoReturn:
    """A configuration that the caller gave and that does not fit the GPU is the caller's error."""
    if kernel_config is None:
        raise error
    raise ValueError(f"moe_ops: kernel_config does not fit this GPU: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(dtype: torch.dtype) -> str:
    """How products are taken: fp32 ones as torch's own matmul precision setting says."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Gemm:
    """One grouped GEMM over the rows of all experts; b is (E, K, N) in any strides."""

    def __init__(
        self,
        kind: str,
        *,
        x: torch.Tensor,
        b: torch.Tensor,
        token_counts: torch.Tensor,
        num_rows: int,
        gather: torch.Tensor | None,
        x_divisor: int,
        scale: torch.Tensor | None,
        top_k: int,
        scatter_y: bool,
        has_bias: bool = False,
        has_dots: bool = False,
        kernel_config: str | None,
    ) -> None:
        refuse_bf16(x)
        self.x, self.b = x, b
        self.token_counts = token_counts.contiguous()
        self.num_rows = num_rows
        self.gather = None if gather is None else gather.contiguous()
        self.x_divisor = x_divisor
        self.scale = scale
        self.top_k = top_k
        self.scatter_y = scatter_y
        self.kernel_config = kernel_config
        self.num_experts, self.k, self.n = b.shape
        self.b_is_nk = b.stride(1) == 1
        self.device = device_of(x.device)
        is_forward = kind == "forward"
        out_features, in_features = (self.n, self.k) if is_forward else (self.k, self.n)
        flags = {
            "gather": x_divisor > 0,
            "scatter": scatter_y,
            "scale": scale is not None,
            "bias": has_bias,
            "dots": has_dots,
            "transposed": self.b_is_nk != is_forward,
        }
        rows = rows_bucket(num_rows, self.num_experts)
        problem = Problem(
            kind, _name(x.dtype), self.num_experts, out_features, in_features, rows,
            tuple(flag for flag, is_set in flags.items() if is_set),
        )  # fmt: skip
        self.tiling = _Tiling.of(choose(problem, self.device, kernel_config))
        block_m = self.tiling.block_m
        self.tiles_n = cdiv(self.n, self.tiling.block_n)
        self.max_tiles = cdiv(num_rows, block_m) + self.num_experts
        self.finds_tiles = block_m <= _FINDS_TILES_ROWS and not has_dots
        self.tiles = None
        if not self.finds_tiles:
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
        tiling, config = self.tiling, self.tiling.config
        experts = next_power_of_2(self.num_experts)
        try:
            with launch_on(self.x):
                if not self.finds_tiles:
                    # More programs than experts: all of them share the rows to zero.
                    tile_schedule_kernel[(max(self.num_experts, self.device.num_sms),)](
                        self.token_counts, self.tiles, y, self.gather,
                        self.num_rows, self.num_experts, self.max_tiles, self.n,
                        BLOCK_M=tiling.block_m, EXPERTS=experts, BLOCK_W=1024,
                        ZERO_TAIL=y is not None, SCATTER=self.scatter_y,
                    )  # fmt: skip
                x_desc, b_desc, y_desc = self._descriptors(y, tiling.block_m)
                x_tail_desc = y_tail_desc = None
                if tiling.tail_tiles:
                    x_tail_desc, _, y_tail_desc = self._descriptors(y, tiling.block_m // 2)
                programs = self.device.num_sms * config.programs_per_sm
                programs = min(programs, max(self.max_tiles * self.tiles_n, 1))
                _grouped_gemm_kernel[(programs,)](
                    self.x, x_desc, x_tail_desc, self.b, b_desc, bias, self.scale, self.gather,
                    y, y_desc, y_tail_desc, other, dots, self.token_counts, self.tiles,
                    self.max_tiles, self.num_rows, self.num_experts, self.n, self.k, self.top_k,
                    max(self.x_divisor, 1), self.top_k if gather_other else 1,
                    *self.x.stride(), *self.b.stride(), *_strides(bias), *_strides(self.scale),
                    *_strides(other),
                    BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
                    GROUP_M=config.group_m, PRECISION=_precision(self.x.dtype),
                    TMA_X=x_desc is not None, TMA_B=b_desc is not None, TMA_Y=y_desc is not None,
                    B_IS_NK=self.b_is_nk, EVEN_K=self.k % tiling.block_k == 0,
                    GATHER_X=self.x_divisor > 0, SCATTER_Y=self.scatter_y,
                    HAS_GATHER=self.gather is not None, HAS_BIAS=bias is not None,
                    HAS_SCALE=self.scale is not None, STORE_Y=y is not None,
                    HAS_DOTS=dots is not None, GATHER_OTHER=gather_other,
                    FINDS_TILES=self.finds_tiles, EXPERTS=experts if self.finds_tiles else 1,
                    BLOCK_W=1024, TAIL_TILES=tiling.tail_tiles, FLATTEN=config.flatten,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        except OutOfResources as error:
            _refuse_too_large(error, self.kernel_config)

    def _descriptors(self, y: torch.Tensor | None, block_m: int) -> list[TensorDescriptor | None]:
        """Of x, b and y, for tiles of block_m rows; None where pointers serve."""
        tiling = self.tiling
        x_desc = b_desc = y_desc = None
        if self.k > 0 and tiling.tma_x and not self.x_divisor and _has_tma(self.x):
            x_desc = TensorDescriptor.from_tensor(self.x, [block_m, tiling.block_k])
        described = self.b.transpose(1, 2) if self.b_is_nk else self.b
        if self.k > 0 and self.n > 0 and tiling.tma_b and _has_tma(described):
            block = (tiling.block_n, tiling.block_k)
            block = block if self.b_is_nk else block[::-1]
            b_desc = TensorDescriptor.from_tensor(described, [1, *block])
        if y is not None and self.n > 0 and tiling.config.use_tma_store and not self.scatter_y:
            # Ends at the expert's last row, wherever that is.
            y_desc = create_ragged_descriptor(y, [block_m, tiling.block_n]) if _has_tma(y) else None
        return [x_desc, b_desc, y_desc]

    def launch_bias_dots(self, bias: torch.Tensor, dots: torch.Tensor) -> None:
        """Writes dots[slot] = <x[row], bias[e]>, on the schedule that `launch` made."""
        if self.num_rows == 0 or self.num_experts == 0:
            return
        with launch_on(self.x):
            _grouped_gemm_bwd_bias_dots_kernel[(self.max_tiles,)](
                self.x, self.gather, bias, dots, self.tiles, self.max_tiles, self.num_rows, self.k,
                *self.x.stride(), *bias.stride(),
                BLOCK_M=self.tiling.block_m, BLOCK_N=64, HAS_GATHER=self.gather is not None,
                GATHER_G=self.x_divisor > 0,
            )  # fmt: skip


def _strides(matrix: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()
