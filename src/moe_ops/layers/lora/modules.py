# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts as modules: the adapter of one projection, and a layer of experts with adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_ops._core.checks import check_at_least
from moe_ops._core.sharded import is_parallel
from moe_ops.fp8 import dequantize_fp8
from moe_ops.layers.experts import Experts
from moe_ops.layers.lora.functional import LoraWeights, check_dropout, lora_experts
from moe_ops.quantization import QuantizedWeight

_HERE = "moe_ops.layers.lora"


class GroupedLora(nn.Module):
    """The adapter of one projection of every expert, as trainable parameters.

    lora_A (num_experts, rank, in_features) is drawn as nn.Linear draws its weight, lora_B
    (num_experts, out_features, rank) is zero, so that training starts from the base model.

    Args:
        num_experts, in_features, out_features: sizes of the projection's weight.
        rank: width of the adapter, at least 1.
        lora_alpha: scaling is lora_alpha / rank, or lora_alpha / sqrt(rank) with use_rslora.
        use_rslora: scale as rank-stabilised LoRA does.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        lora_alpha: float = 16.0,
        *,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(f"{_HERE}.GroupedLora", 1, rank=rank)
        self.scaling = lora_alpha / (math.sqrt(rank) if use_rslora else rank)
        self.lora_A = nn.Parameter(
            torch.empty(num_experts, rank, in_features, device=device, dtype=dtype)
        )
        self.lora_B = nn.Parameter(
            torch.empty(num_experts, out_features, rank, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A anew and zero lora_B."""
        bound = max(self.lora_A.shape[2], 1) ** -0.5
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def weights(self) -> LoraWeights:
        """Return the parameters as lora_grouped_gemm takes them."""
        return LoraWeights(self.lora_A, self.lora_B, self.scaling)

    def delta_weight(self) -> Tensor:
        """Return what merging adds to the weight, (num_experts, out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Return the sizes, for print(module)."""
        num_experts, rank, in_features = self.lora_A.shape
        return (
            f"num_experts={num_experts}, in_features={in_features}, "
            f"out_features={self.lora_B.shape[1]}, rank={rank}, scaling={self.scaling:g}"
        )


class LoraExperts(nn.Module):
    """A layer of frozen experts with trainable adapters; it stands where the layer stood.

    Args:
        experts: the layer, whose parameters are frozen here and not copied; also one after
            Experts.quantize_() or Experts.quantize_fp8_().
        rank: width of the adapters.
        lora_alpha: as GroupedLora has it.
        use_rslora: as GroupedLora has it.
        targets: the projections that get an adapter, of the experts' up projection ("gate_up_proj",
            or "up_proj" where they are not gated) and "down_proj"; both where None.
        lora_dropout: dropout_p of lora_grouped_gemm in training mode.
        dtype: of the adapters; None for that of the experts' weights, bfloat16 after quantize_fp8_().

    Raises:
        TypeError: experts that are no moe_ops.layers.Experts.
        ValueError: other targets; a dropout_p outside [0, 1); experts with weights_before, recompute
            or a kernel_config, which are not supported here, whenever they are set; a rank below 1;
            experts after expert_parallel.
    """

    def __init__(
        self,
        experts: Experts,
        rank: int,
        lora_alpha: float = 16.0,
        *,
        use_rslora: bool = False,
        targets: Sequence[str] | None = None,
        lora_dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(experts, Experts):
            raise TypeError(
                f"{_HERE}.LoraExperts: expected experts to be a moe_ops.layers.Experts, got "
                f"{type(experts).__name__}; use lora_experts for other weights"
            )
        self._is_merged = False
        self._up_name = "gate_up_proj" if experts.gated else "up_proj"
        known = (self._up_name, "down_proj")
        targets = known if targets is None else targets
        if not targets or not set(targets) <= set(known):
            raise ValueError(
                f"{_HERE}.LoraExperts: expected targets among {known}, got {targets!r}; "
                "pass None for both"
            )
        _check_experts(experts)
        if is_parallel(experts):
            raise ValueError(
                f"{_HERE}.LoraExperts: expected experts that are not spread over ranks yet, got experts "
                "after expert_parallel; add the adapters first"
            )
        check_dropout("LoraExperts", "lora_dropout", lora_dropout)
        check_at_least(f"{_HERE}.LoraExperts", 1, rank=rank)
        self.experts = experts.requires_grad_(False)
        self.lora_dropout = lora_dropout
        self.adapters = nn.ModuleDict()
        for name in targets:
            weight = getattr(experts, name)
            num_experts, out_features, in_features = weight.shape
            usual = weight.dtype if experts.scale(name) is None else torch.bfloat16
            self.adapters[name] = GroupedLora(
                num_experts, in_features, out_features, rank, lora_alpha,
                use_rslora=use_rslora, device=weight.device, dtype=dtype or usual,
            )  # fmt: skip

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute the weighted sum of each token's experts, (T, H), as lora_experts does."""
        self._check_not_merged("forward")
        experts, up_name = self.experts, self._up_name
        _check_experts(experts)
        up_weight, up_bias = experts.projection(up_name)
        down_weight, down_bias = experts.projection("down_proj")
        return lora_experts(
            hidden_states,
            up_weight,
            down_weight,
            topk_ids,
            topk_weights,
            self._weights(up_name),
            self._weights("down_proj"),
            up_bias,
            down_bias,
            experts.activation,
            experts.gated,
            experts.interleaved,
            experts.activation_limit,
            self.lora_dropout if self.training else 0.0,
            experts.scale(up_name),
            experts.scale("down_proj"),
        )

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> Experts:
        """Add the adapters to the weights, in place, and return the layer, still frozen, without them.

        Args:
            dtype: what quantised weights are dequantised to first, both projections, and what their
                biases are cast to: that of the hidden states that the layer is to take. None is that
                of the adapters for weights of quantize_fp8_(), and is refused for a QuantizedWeight.
                Other weights keep theirs.

        Returns:
            The layer. This module is of no use after it.

        Raises:
            ValueError: it was merged before; a QuantizedWeight, and no dtype.
        """
        self._check_not_merged("merge")
        experts = self.experts
        quantised = {n: w for n, w in experts.named_children() if isinstance(w, QuantizedWeight)}
        if quantised and dtype is None:
            formats = ", ".join(sorted({weight.format for weight in quantised.values()}))
            raise ValueError(
                f"{_HERE}.LoraExperts.merge: expected dtype with quantised experts ({formats}), got None: "
                "quantising the sum would lose most of the adapters; pass the dtype to dequantise both "
                "projections to, or keep the adapters"
            )
        for name, quantised_weight in quantised.items():
            values = quantised_weight.dequantize(dtype)
            delattr(experts, name)
            setattr(experts, name, nn.Parameter(values, requires_grad=False))
            if (bias := getattr(experts, f"{name}_bias")) is not None:
                bias.data = bias.to(dtype)
        dtype = dtype or next(self.adapters.parameters()).dtype
        for name in (self._up_name, "down_proj"):
            if (scale := experts.scale(name)) is not None:
                weight = dequantize_fp8(getattr(experts, name), scale, dtype)
                setattr(experts, name, nn.Parameter(weight, requires_grad=False))
                setattr(experts, f"{name}_scale", None)
        # From here on, and not where a dtype was refused above.
        self._is_merged = True
        for name in self.adapters:
            getattr(experts, name).add_(self._adapter(name).delta_weight())
        return experts

    @property
    def down_proj(self) -> Tensor | QuantizedWeight:
        """Return the layer's down projection; its shape tells the layer's sizes."""
        return self.experts.down_proj

    def _check_not_merged(self, function: str) -> None:
        if self._is_merged:
            raise ValueError(
                f"{_HERE}.LoraExperts.{function}: expected adapters that are not merged, got merged "
                "ones; use the layer that merge() returned"
            )

    def _weights(self, name: str) -> tuple[LoraWeights, ...]:
        return (self._adapter(name).weights(),) if name in self.adapters else ()

    def _adapter(self, name: str) -> GroupedLora:
        adapter = self.adapters[name]
        assert isinstance(adapter, GroupedLora)
        return adapter


def _check_experts(experts: Experts) -> None:
    for option, expected, advice in (
        ("weights_before", False, "adapters on such experts are not supported"),
        ("recompute", "none", "set experts.recompute = 'none'"),
        ("kernel_config", None, "set experts.kernel_config = None"),
    ):
        if (got := getattr(experts, option)) != expected:
            raise ValueError(
                f"{_HERE}.LoraExperts: expected experts with {option}={expected!r}, got {got!r}; "
                f"{advice}"
            )
