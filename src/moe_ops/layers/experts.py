# SPDX-License-Identifier: Apache-2.0
"""The experts of an MoE layer, and the MLP that its shared expert is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_ops import fused_experts
from moe_ops._core.checks import check_at_least, check_hidden_size, check_weight_dtype
from moe_ops._pytorch.activation import GATE_ACTIVATIONS, gate_function
from moe_ops.fp8 import quantize_fp8
from moe_ops.layers.functional import composed_experts, named_activation, projection
from moe_ops.quantization import QuantizedWeight, quantize_weight

# What to do about a bias or a scale that keeps a layer from being quantised.
_ADVICE = {
    "bias": "use quantize_('fp8_block'), which keeps biases",
    "scale": "call it once",
}


class _Form(NamedTuple):
    """How a layer keeps its weights; the first that fits a state is the state's.

    Attributes:
        name: as an error has it.
        suffix: ends the name of what a state has in this form alone, or at least.
        advice: what to do with a state in this form.
    """

    name: str
    suffix: str
    advice: str


_FORMS = (
    _Form("FP8", "_scale", "call quantize_fp8_() on the layer first"),
    _Form("quantised", ".codes", "call quantize_() on the layer first"),
    _Form("plain", "", "load them before the layer is quantised"),
)


class Experts(nn.Module):
    """Compute each token's experts, and their weighted sum.

    It is moe::fused_experts with its parameters; the options are that op's, which checks them when
    the module is called (docs/ops/fused_experts.md has the equation). Sizes are checked when the
    module is made.

    Args:
        num_experts (int): number of experts.
        hidden_size (int): size of a token's hidden state.
        intermediate_size (int): size between an expert's projections.
        activation (str): "silu", "gelu", "gelu_tanh", "relu", "relu_squared" or "swiglu_oai".
        gated (bool): whether the activation of one half of the up projection multiplies the other.
        interleaved (bool): whether gate and up rows take turns, or all gate rows stand first.
        bias (bool): whether both projections have biases.
        activation_limit (float or None): clamps gate and up before the activation (gpt-oss).
        weights_before (bool): multiply the router weights with the experts' input, not with their
            output (Llama 4).
        recompute (str): "none", or "pre_activation" to save no activation of the experts and
            compute it again in the backward.
        kernel_config (str or None): what moe_ops.kernel_config() makes; None chooses by shape.
        device, dtype: of the parameters.

    Parameters, in Hugging Face's layout, U being 2 * intermediate_size where gated, else
    intermediate_size:
        gate_up_proj (num_experts, U, hidden_size); its name is up_proj where not gated.
        down_proj (num_experts, hidden_size, intermediate_size).
        gate_up_proj_bias or up_proj_bias (num_experts, U), down_proj_bias (num_experts,
            hidden_size), or None.

    quantize_() makes the projections QuantizedWeights, whose gradients nobody has: the layer then is
    moe::fused_experts_quantized. quantize_fp8_() makes them FP8 with scales. The layer then is no
    longer one op, but moe::grouped_gemm_quantized twice with the activation between.

    Raises:
        ValueError: no expert, or a negative size.
        TypeError: a size that is no int; a dtype that is not a floating one of 16 bits or more.

    Each expert begins as two nn.Linear do: weights and biases uniform in +-1 / sqrt(input size).

    Source: the experts of Mixtral (arXiv:2401.04088).
    """

    down_proj: nn.Parameter | QuantizedWeight

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        bias: bool = False,
        activation_limit: float | None = None,
        weights_before: bool = False,
        recompute: str = "none",
        kernel_config: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        here = "moe_ops.layers.Experts"
        check_at_least(here, 1, num_experts=num_experts)
        check_at_least(here, 0, hidden_size=hidden_size, intermediate_size=intermediate_size)
        if dtype is not None:
            check_weight_dtype(here, dtype)
        self.activation = activation
        self.gated = gated
        self.interleaved = interleaved
        self.activation_limit = activation_limit
        self.weights_before = weights_before
        self.recompute = recompute
        self.kernel_config = kernel_config

        def add_projection(name: str, out_size: int, in_size: int) -> None:
            def parameter(*shape: int) -> nn.Parameter:
                return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

            self.register_parameter(name, parameter(out_size, in_size))
            self.register_parameter(f"{name}_bias", parameter(out_size) if bias else None)
            self.register_buffer(f"{name}_scale", None)

        self._up_name = "gate_up_proj" if gated else "up_proj"
        add_projection(self._up_name, (2 if gated else 1) * intermediate_size, hidden_size)
        add_projection("down_proj", hidden_size, intermediate_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters, as after to_empty().

        Raises:
            ValueError: the layer is quantised.
        """
        self._check_plain("reset_parameters", "reset a new layer and quantise that")
        for name in (self._up_name, "down_proj"):
            weight, bias = self.projection(name)
            bound = max(weight.shape[2], 1) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            hidden_states ((T, hidden_size), the parameters' dtype): one row per token.
            topk_ids ((T, top_k), int32 or int64): the experts of each token; ids outside
                [0, num_experts) are dropped.
            topk_weights ((T, top_k), floating): their weights.

        Returns:
            output ((T, hidden_size), the dtype of hidden_states): weighted and summed in fp32.

        Raises:
            ValueError, TypeError: from moe::fused_experts, for an option or a dtype it does not take.
            ValueError: the same of an option, where the layer is quantised; an FP8 parameter that
                requires grad, where a gradient is recorded.

        Differentiable in hidden_states, topk_weights and the parameters that are not FP8.
        """
        if self._has_scales:
            return self._composed(hidden_states, topk_ids, topk_weights)
        up_weight, up_bias = self.projection(self._up_name)
        down_weight, down_bias = self.projection("down_proj")
        return fused_experts(
            hidden_states,
            up_weight,
            down_weight,
            topk_ids,
            topk_weights,
            up_bias,
            down_bias,
            self.activation,
            self.gated,
            self.interleaved,
            self.activation_limit,
            self.weights_before,
            self.recompute,
            self.kernel_config,
        )

    def _composed(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute forward with FP8 weights, which moe::fused_experts does not take."""
        function = "moe_ops.layers.Experts.forward"
        if self.recompute not in ("none", "pre_activation"):
            raise ValueError(
                f"{function}: expected recompute to be one of none, pre_activation, "
                f"got {self.recompute!r}"
            )
        up, down = (
            projection(*self.projection(name), self.scale(name), self.kernel_config)
            for name in (self._up_name, "down_proj")
        )
        activation = named_activation(
            function,
            self.activation,
            gated=self.gated,
            interleaved=self.interleaved,
            limit=self.activation_limit,
        )

        def compute(x: Tensor, weights: Tensor) -> Tensor:
            num_experts = self.down_proj.shape[0]
            return composed_experts(
                x, topk_ids, weights, num_experts, up, activation, down,
                weights_before=self.weights_before,
            )  # fmt: skip

        if self.recompute == "none":
            return compute(hidden_states, topk_weights)
        output: Tensor = checkpoint(
            compute, hidden_states, topk_weights, use_reentrant=False, preserve_rng_state=False
        )
        return output

    @torch.no_grad()
    def quantize_(self, format: str, group_size: int | None = None) -> Experts:
        """Quantise both projections with moe_ops.quantize_weight, and freeze the layer.

        Each projection becomes a QuantizedWeight of the same name. Options and biases stay as they are.
        The layer still has a gradient for hidden_states and topk_weights, and
        moe_ops.layers.lora.LoraExperts adds adapters to it. Only a layer that is quantised in the same
        way loads a state with them.

        Args:
            format (str): "fp8_block", "nf4", "mxfp4" or "int4".
            group_size (int or None): as of moe_ops.quantize_weight.

        Returns:
            This layer.

        Raises:
            ValueError: the layer is quantised already; an unknown format, or a group_size that it has
                not.
        """
        self._check_plain("quantize_", "call it once")
        for name in (self._up_name, "down_proj"):
            weight = quantize_weight(getattr(self, name), format, group_size)
            delattr(self, name)
            setattr(self, name, weight)
        self.requires_grad_(False)
        return self

    @property
    def is_quantised(self) -> bool:
        """Tell whether quantize_() or quantize_fp8_() has quantised the projections."""
        return self._has_scales or isinstance(self.down_proj, QuantizedWeight)

    @property
    def _has_scales(self) -> bool:
        """Tell whether the projections are FP8 weights beside their scales: of quantize_fp8_()."""
        return self.scale("down_proj") is not None

    @torch.no_grad()
    def quantize_fp8_(self) -> Experts:
        """Quantise both projections with moe_ops.quantize_fp8, and freeze the layer.

        The parameters are replaced by new ones in float8_e4m3fn, and the buffers gate_up_proj_scale
        (up_proj_scale where not gated) and down_proj_scale hold the scales of their blocks.
        The layer still computes and still has a gradient for hidden_states and topk_weights;
        moe_ops.layers.lora.LoraExperts adds adapters to it. Weights and scales keep their dtypes
        where a whole model is converted, as by module.bfloat16(). Only a layer that is quantised
        loads a state with them.

        Returns:
            This layer.

        Raises:
            ValueError: the layer has biases, which quantize_("fp8_block") takes, or is quantised already.
        """
        names = (self._up_name, "down_proj")
        if isinstance(self.down_proj, QuantizedWeight):
            self._check_plain("quantize_fp8_", "use that layer")
        for name in names:
            for kind in ("bias", "scale"):
                if getattr(self, f"{name}_{kind}") is not None:
                    raise ValueError(
                        "moe_ops.layers.Experts.quantize_fp8_: expected experts without biases that "
                        f"are not quantised yet, got {name}_{kind}; {_ADVICE[kind]}"
                    )
        for name in names:
            quantised, scale = quantize_fp8(getattr(self, name))
            setattr(self, name, nn.Parameter(quantised, requires_grad=False))
            setattr(self, f"{name}_scale", scale)
        return self

    def _check_plain(self, method: str, advice: str) -> None:
        """Refuse to do with quantised weights what takes plain ones.

        Raises:
            ValueError: they are quantised.
        """
        if self.is_quantised:
            raise ValueError(
                f"moe_ops.layers.Experts.{method}: expected experts that are not quantised yet, got "
                f"quantised ones; {advice}"
            )

    def scale(self, name: str) -> Tensor | None:
        """Return the scales of the weight called name, or None where it is not quantised."""
        scale: Tensor | None = getattr(self, f"{name}_scale")
        return scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Convert the module as any other, but keep the dtypes of FP8 weights and their scales."""
        if not self._has_scales:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as any module, but say what to do about weights in another form than the layer's."""
        own = "FP8" if self._has_scales else "quantised" if self.is_quantised else "plain"
        for name in (self._up_name, "down_proj"):
            key = f"{prefix}{name}"
            found = [form for form in _FORMS if f"{key}{form.suffix}" in state_dict]
            if found and found[0].name != own:
                error_msgs.append(
                    f"expected {own} weights in {key}, got {found[0].name} ones; {found[0].advice}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def projection(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the weight called name, and its bias."""
        return getattr(self, name), getattr(self, f"{name}_bias")

    def extra_repr(self) -> str:
        """Return the sizes and the activation, for print(module)."""
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"num_experts={num_experts}, hidden_size={hidden_size}, "
            f"intermediate_size={intermediate_size}, activation={self.activation!r}"
        )


class GatedMLP(nn.Module):
    """Compute a gated MLP without biases, as shared experts are: down(act(gate(x)) * up(x)).

    Args:
        hidden_size (int): size of a token's hidden state.
        intermediate_size (int): size between the projections.
        activation (str): "silu", "gelu", "gelu_tanh", "relu" or "relu_squared".
        device, dtype: of the parameters, which nn.Linear makes and initialises.

    Raises:
        ValueError: an activation other than these, or a negative size.
        TypeError: a size that is no int; a dtype that is not a floating one of 16 bits or more.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        here = "moe_ops.layers.GatedMLP"
        check_at_least(here, 0, hidden_size=hidden_size, intermediate_size=intermediate_size)
        if dtype is not None:
            check_weight_dtype(here, dtype)
        if activation not in GATE_ACTIVATIONS:
            raise ValueError(
                f"{here}: expected activation to be one of "
                f"{', '.join(GATE_ACTIVATIONS)}, got {activation!r}"
            )

        def linear(in_size: int, out_size: int) -> nn.Linear:
            return nn.Linear(in_size, out_size, bias=False, device=device, dtype=dtype)

        self.activation = activation
        self.hidden_size = hidden_size
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden_states (..., hidden_size) to an output of the same shape.

        Raises:
            ValueError: hidden states of another size.
        """
        check_hidden_size("moe_ops.layers.GatedMLP", hidden_states, self.hidden_size)
        gate = gate_function(self.activation)(self.gate_proj(hidden_states))
        output: Tensor = self.down_proj(gate * self.up_proj(hidden_states))
        return output
