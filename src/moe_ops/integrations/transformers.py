# SPDX-License-Identifier: Apache-2.0
"""Run the experts of Hugging Face transformers on torch.ops.moe.*.

After register(), `experts_implementation="moe_ops"` is one more choice beside transformers' own
"eager", "batched_mm" and "grouped_mm". Routers and everything around the experts stay the model's
own code, and so does an activation that moe::fused_experts does not know.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from moe_ops import fused_experts
from moe_ops._core.autocast import is_autocast
from moe_ops._pytorch.activation import Activation
from moe_ops.integrations import default_experts
from moe_ops.integrations.default_experts import IMPLEMENTATION
from moe_ops.integrations.quantised_experts import (
    dequantize_experts_,
    quantize_experts_,
    turned,
    up_name,
)
from moe_ops.integrations.requirements import check_version, missing
from moe_ops.integrations.transformers_private import forget
from moe_ops.layers.functional import composed_experts, flattened, in_shape_of, projection
from moe_ops.quantization import QuantizedWeight

if TYPE_CHECKING:
    from moe_ops.integrations.adoption import adopt_config
    from moe_ops.integrations.quantizer import MoeOpsConfig

__all__ = [
    "MoeOpsConfig",
    "adopt_config",
    "dequantize_experts_",
    "quantize_experts_",
    "register",
    "unregister",
]

MINIMUM_VERSION = "5.17"


def register(*, default: bool = False) -> None:
    """Make `experts_implementation="moe_ops"` known to transformers.

    Call it once before a model is built or switched; calling it again changes nothing. It holds
    for the process, for every model class that goes through transformers' experts interface, in
    `from_pretrained`, `from_config` and `model.set_experts_implementation`. unregister() undoes
    it. Each such class then computes

        rows          = hidden_states gathered in expert order
        rows          = act(rows @ gate_up_proj.T + gate_up_proj_bias), act being the class's own
        rows          = rows @ down_proj.T + down_proj_bias
        hidden_states = sum over a token's slots of top_k_weights * rows

    with moe::fused_experts where it knows the activation (docs/transformers.md has the list), with
    moe::routing_indices, moe::grouped_gemm and moe::unpermute elsewhere. Slots whose expert id is
    outside [0, num_experts), as expert parallelism marks the experts of other ranks, are dropped:
    their output, input gradient and router gradient are exactly zero.

    Differentiable in hidden_states, top_k_weights and every parameter of the experts. The same
    inputs give the same bits.

    A saved model does not keep the implementation that it ran with. The logger "moe_ops" says once
    for each family of models which one a model got that names none.

    Args:
        default: whether every such model that is built from now on, and names no implementation,
            gets "moe_ops" in place of transformers' "grouped_mm". Classes that have a default of
            their own keep it. False leaves an earlier register(default=True) as it is. Fine-grained
            FP8 experts, which moe_ops does not compute, then take transformers' "grouped_mm".

    Raises:
        ImportError: transformers is missing, older than 5.17, or has no experts interface.

    Source: the experts interface of transformers, transformers/integrations/moe.py.
    """
    here = "moe_ops.integrations.transformers"
    try:
        import transformers
    except ImportError as error:
        raise missing(here, "transformers", MINIMUM_VERSION, error) from error
    check_version(here, transformers, MINIMUM_VERSION)
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"{here}: expected transformers >= {MINIMUM_VERSION} with its experts interface, got "
            f"{transformers.__version__} without: {error}"
        ) from error
    ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    # FP8 experts dispatch through an interface of their own. Unregistered there, the name would be
    # accepted by the model and then called unknown in its first forward.
    with contextlib.suppress(ImportError):
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

        FP8ExpertsInterface.register(IMPLEMENTATION, refuse_fp8_experts)
    default_experts.install(default)
    from moe_ops.integrations import quantizer

    quantizer.register()


def unregister() -> None:
    """Undo every register(), its default too, and leave nothing of it in transformers.

    Without a register() before it does nothing. A model that runs with "moe_ops" has to be switched
    first, as by `model.set_experts_implementation("grouped_mm")`: its next forward would otherwise
    raise transformers' KeyError.
    """
    default_experts.uninstall()
    _forget("moe", "ExpertsInterface", experts_forward)
    _forget("finegrained_fp8", "FP8ExpertsInterface", refuse_fp8_experts)
    if quantizer := sys.modules.get("moe_ops.integrations.quantizer"):
        quantizer.unregister()


def _forget(module: str, name: str, function: Callable[..., Any]) -> None:
    interface = getattr(sys.modules.get(f"transformers.integrations.{module}"), name, None)
    if interface is not None:
        forget(interface, IMPLEMENTATION, function)


def __getattr__(name: str) -> Any:
    # These need transformers, which `import moe_ops.integrations.transformers` does not import.
    if name == "MoeOpsConfig":
        from moe_ops.integrations.quantizer import MoeOpsConfig

        return MoeOpsConfig
    if name == "adopt_config":
        from moe_ops.integrations.adoption import adopt_config

        return adopt_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Experts(Protocol):
    """What every experts module of transformers says of itself.

    Beside these it has the parameters gate_up_proj or, without has_gate, up_proj, and down_proj;
    with has_bias one called *_bias for each; with has_post_expert_norm the module post_expert_norm.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]


def experts_forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute an experts module, as transformers calls the implementation that it dispatches to.

    Args:
        self: the experts module; its num_experts, has_gate, has_bias, is_transposed, weights and
            activation say what to compute.
        hidden_states ((..., hidden_size), floating): rows in token order.
        top_k_index ((..., top_k), int32 or int64): expert of each slot; ids outside
            [0, num_experts) are dropped.
        top_k_weights ((..., top_k), floating): router weight of each slot.

    Returns:
        hidden_states ((..., hidden_size), the dtype of hidden_states): the weighted sum of each
            token's experts.

    Differentiable in hidden_states, top_k_weights and the module's parameters. Deterministic.
    """
    activation = known_activation(self)
    tokens, topk_ids, topk_weights = flattened(hidden_states, top_k_index, top_k_weights)
    up_weight, up_bias = weight_and_bias(self, up_name(self), hidden_states)
    down_weight, down_bias = weight_and_bias(self, "down_proj", hidden_states)
    tokens = in_dtype_for(up_weight, tokens)
    if activation is not None:
        output = fused_experts(
            tokens,
            up_weight,
            down_weight,
            topk_ids,
            topk_weights,
            up_bias,
            down_bias,
            activation.name,
            gated=activation.gated,
            interleaved=activation.interleaved,
            activation_limit=activation.limit,
        )
    else:
        apply_gate = self._apply_gate if self.has_gate else self.act_fn
        output = composed_experts(
            tokens,
            topk_ids,
            topk_weights,
            self.num_experts,
            up=projection(up_weight, up_bias),
            activation=lambda z: in_dtype_for(down_weight, apply_gate(z), hidden_states),
            down=projection(down_weight, down_bias),
            norm=self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None,
        )
    return in_shape_of(hidden_states, output).to(hidden_states.dtype)


# Activation modules by the name of their class, torch's and those of transformers' ACT2FN.
_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "ReLU": "relu", "ReLUSquaredActivation": "relu_squared",
}  # fmt: skip
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
# Classes with an _apply_gate of their own that fused_experts knows: how they call their limit and, if
# the gate's sigmoid has one, its slope; whether gate and up are interleaved.
_GATES = {
    "GptOssExperts": ("limit", "alpha", True),
    "OpenAIPrivacyFilterExperts": ("limit", "alpha", False),
    "MiniMaxM3VLExperts": ("swiglu_limit", "swiglu_alpha", False),
    "DeepseekV4Experts": ("limit", "", False),
    "HYV4Experts": ("swiglu_limit", "", False),
    "Glm5NextTextExperts": ("swiglu_limit", "", False),
}
_OAI_SLOPE = 1.702


def known_activation(experts: Experts) -> Activation | None:
    """Return the activation of an experts module, or None where fused_experts does not have it."""
    if getattr(experts, "has_post_expert_norm", False):
        return None
    gate = type(experts)._apply_gate if experts.has_gate else None
    if gate is None or gate.__module__ == "transformers.integrations.moe":
        name = activation_name(experts.act_fn)
        return None if name is None else Activation(name, gated=experts.has_gate)
    known = _GATES.get(type(experts).__name__)
    if known is None or not gate.__module__.startswith("transformers.models."):
        return None
    limit_name, slope_name, interleaved = known
    limit = getattr(experts, limit_name, None)
    if not isinstance(limit, float) or limit <= 0:
        return None
    if slope_name:
        is_oai = getattr(experts, slope_name, None) == _OAI_SLOPE
        name = "swiglu_oai" if is_oai else None
    else:
        name = "silu" if activation_name(getattr(experts, "act_fn", F.silu)) == "silu" else None
    return None if name is None else Activation(name, interleaved=interleaved, limit=limit)


def activation_name(activation: Any) -> str | None:
    """Return what fused_experts calls an activation module or function, or None if it has none."""
    if isinstance(activation, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    if isinstance(activation, nn.Module):
        return _ACTIVATIONS.get(type(activation).__name__)
    return _FUNCTIONS.get(activation)


def refuse_fp8_experts(self: object, *args: object, **kwargs: object) -> Any:
    """Refuse to compute fine-grained FP8 experts, and say what to do.

    Where moe_ops is the default, the model need not have asked for it: transformers' own
    "grouped_mm" computes them, which they would have got without us.

    Raises:
        NotImplementedError: moe_ops is not the default, so the model asked for it.
    """
    if default_experts.is_default():
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

        return FP8ExpertsInterface()["grouped_mm"](self, *args, **kwargs)
    raise NotImplementedError(
        f'experts_implementation="{IMPLEMENTATION}" does not compute fine-grained FP8 experts '
        f"({type(self).__name__}); load with FineGrainedFP8Config(dequantize=True), or use "
        'experts_implementation="grouped_mm"'
    )


def weight_and_bias(
    experts: Experts, name: str, hidden_states: Tensor
) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
    """Return the weight called name as (num_experts, out_features, in_features), and its bias."""
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if bias is not None:
        bias = in_dtype_for(weight, bias, hidden_states)
    return weight if isinstance(weight, QuantizedWeight) else turned(experts, weight), bias


def in_dtype_for(
    weight: Tensor | QuantizedWeight, tensor: Tensor, hidden_states: Tensor | None = None
) -> Tensor:
    """Cast a tensor to the dtype that is computed in: fp32 residual streams and biases meet bf16 weights.

    A weight computes in its own dtype, a quantised one in that of the hidden states. Under autocast
    the op casts both; casting here first would bring bf16 rows to fp32 and back.
    """
    if is_autocast(tensor):
        return tensor
    if isinstance(weight, QuantizedWeight):
        return tensor if hidden_states is None else tensor.to(hidden_states.dtype)
    return tensor.to(weight.dtype)
