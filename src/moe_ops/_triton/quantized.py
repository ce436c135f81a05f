# SPDX-License-Identifier: Apache-2.0
"""Launch products with quantised weights.

E num_experts, N out_features, D in_features, C experts of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moe_ops._triton.dequantize import StoredForKernel
from moe_ops._triton.kernels.quantized import _quantized_fwd_kernel
from moe_ops._triton.launch import (
    cdiv,
    launch,
    next_power_of_2,
    precision,
    refuse_bf16,
    strides,
)
from moe_ops._triton.plan import BLOCK_W
from moe_ops._triton.rows import new_rows
from moe_ops._triton.schedule import Rows
from moe_ops._triton.weight_plan import WeightPlan, plan_weight
from moe_ops.configs.device import device_of
from moe_ops.configs.problem import rows_bucket
from moe_ops.quantization.stored import StoredWeight


def plan_stored(
    kind: str,
    weight: StoredWeight,
    dtype: torch.dtype,
    rows: Rows,
    kernel_config: str | None,
) -> WeightPlan:
    """Return how a product of these rows reads the weight."""
    num_experts, out_features, in_features = weight.shape
    return plan_weight(
        kind, dtype, weight.format, weight.group_size, num_experts, out_features, in_features,
        rows_bucket(rows.num_rows, num_experts), device_of(weight.codes.device), kernel_config,
    )  # fmt: skip


class Scratch:
    """Dequantise a weight, a part of its experts at a time.

    Args:
        weight: the weight.
        like: a tensor of the dtype that the product multiplies in.
        plan: says how many experts a part has.

    Attributes:
        bounds: the first expert of each part and of the next one.
    """

    def __init__(self, weight: StoredWeight, like: torch.Tensor, plan: WeightPlan) -> None:
        num_experts, experts = weight.shape[0], plan.experts
        self.bounds = [
            (first, min(first + experts, num_experts))
            for first in range(0, num_experts, max(experts, 1))
        ]
        self._weight, self._like, self._experts = weight, like, experts

    @property
    def can_describe(self) -> bool:
        """Return whether TMA can describe a part: its rows begin at sectors, if it has any."""
        return self._experts > 0 and 0 not in self._weight.shape

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Dequantise each part in turn, into the same room (C, N, D).

        Yield the part's first expert, the next part's, and the part.
        """
        _, out_features, in_features = self._weight.shape
        rows = new_rows(self._like, self._experts * out_features, in_features)
        stride = rows.stride(0)
        # unflatten() gives a dimension of size 1 another stride.
        room = rows.as_strided(
            (self._experts, out_features, in_features), (out_features * stride, stride, 1)
        )
        stored = StoredForKernel.of(self._weight) if room.numel() else None
        for first, end in self.bounds:
            part = room[: end - first]
            if stored is not None:
                stored.dequantize(first, part)
            yield first, end, part


class DecodingGemm:
    """Multiply few rows by a weight that the kernel decodes.

    Args:
        x: the rows in expert order, or with x_divisor in the order of tokens or slots.
        weight: the weight (E, N, D).
        rows: the rows of each expert.
        plan: one whose in_product is true.
        x_divisor: row i of the product reads x[gather[i] // x_divisor], or with 0 x[i].
        bias ((E, N), floating): added to the product.
        gated: whether N holds gate and up of an activation.
        interleaved: whether these take turns.
        nested_table: what the bytes of nested scales mean, where another product has written it.
            launch() sets it, so that the next product can take it.
    """

    def __init__(
        self,
        x: torch.Tensor,
        weight: StoredWeight,
        rows: Rows,
        plan: WeightPlan,
        *,
        x_divisor: int = 0,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        interleaved: bool = False,
        nested_table: torch.Tensor | None = None,
    ) -> None:
        refuse_bf16(x)
        self.x, self.weight, self.rows, self.plan = x, weight, rows, plan
        self.x_divisor, self.bias = x_divisor, bias
        self.gated, self.interleaved = gated, interleaved
        self.nested_table = nested_table

    def whole_schedule(self) -> None:
        """Return what GroupedGemm.whole_schedule does: it finds its tiles."""
        return

    @classmethod
    def where_planned(
        cls,
        x: torch.Tensor,
        weight: StoredWeight,
        rows: Rows,
        kernel_config: str | None,
        **flags: Any,
    ) -> DecodingGemm | None:
        """Return it if the plan says that the product decodes, else None. `flags` as above."""
        plan = plan_stored("forward", weight, x.dtype, rows, kernel_config)
        return cls(x, weight, rows, plan, **flags) if plan.in_product else None

    def launch(
        self,
        y: torch.Tensor | None,
        *,
        z: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        scatter_y: bool = False,
        activation: str = "none",
        limit: float | None = None,
    ) -> None:
        """Write z = x @ weight[e].T + bias[e], and y = scale * z or y = act(z).

        Rows of no expert are zeros in z, and in y without an activation.

        Args:
            y: where the result is stored; None: it is not.
            z ((R, N)): where the pre-activation is stored; None: it is not.
            scale ((T, top_k), floating): weight of each slot.
            scatter_y: whether row i is stored at gather[i].
            activation: of z.
            limit: of the activation's input.
        """
        if self.rows.is_empty:
            for output in (y, z):
                if output is not None:
                    output.zero_()
            return
        x, rows, bias, plan, weight = self.x, self.rows, self.bias, self.plan, self.weight
        _, out_features, contracted = weight.shape
        width = out_features // 2 if self.gated else out_features
        block_m, block_n = plan.options["BLOCK_M"], plan.options["BLOCK_N"]
        block_i = block_n // 2 if self.gated else block_n
        device = device_of(x.device)
        tiles = rows.max_tiles(block_m) * cdiv(width, block_i)
        stored = StoredForKernel.of(weight, self.nested_table)
        self.nested_table = stored.nested_table
        launch(
            _quantized_fwd_kernel, (min(device.num_sms * plan.programs_per_sm, tiles),),
            x, *stored.tensors(), bias, scale, rows.gather, y, z, rows.token_counts,
            rows.num_rows, rows.num_experts, width, contracted, *stored.sizes,
            1 if scale is None else rows.top_k, max(self.x_divisor, 1),
            0.0 if limit is None else limit,
            *x.stride(), *strides(bias), *strides(scale), strides(y)[0],
            PRECISION=precision(x.dtype), EVEN_K=contracted % plan.options["BLOCK_K"] == 0,
            GATHER_X=self.x_divisor > 0, SCATTER_Y=scatter_y, HAS_GATHER=rows.gather is not None,
            HAS_BIAS=bias is not None, HAS_WEIGHTS=scale is not None,
            ACTIVATION=activation, HAS_LIMIT=limit is not None, GATED=self.gated,
            INTERLEAVED=self.interleaved, STORE_Y=y is not None, STORE_Z=z is not None,
            EXPERTS=next_power_of_2(rows.num_experts), BLOCK_W=BLOCK_W,
            WHOLE_RUNS=stored.sizes[0] % 8 == 0, enable_fp_fusion=True,
            **plan.options, **stored.options(), **stored.ptx(),
            on=x,
        )  # fmt: skip
