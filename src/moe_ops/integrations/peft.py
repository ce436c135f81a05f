# SPDX-License-Identifier: Apache-2.0
"""Train PEFT's LoRA adapters of transformers' experts without merging them into the weights.

PEFT adapts experts through `LoraConfig(target_parameters=[...])`: around each forward it replaces the
parameter by base + delta, which makes a tensor of the size of the weight, and a gradient of that size
on the way back to the adapters. enable() gives the wrappers of one model another forward, which
reads the same adapters and computes with moe_ops.layers.lora. Everything else stays PEFT's own:
configuration, parameters, saving, loading, merging, switching adapters off.

PEFT offers no place to register a forward for its ParamWrapper. So enable() is a call for one model,
which also reaches models that are wrapped or loaded already, and auto() makes that call wherever PEFT
adds an adapter. The wrappers keep their class, whose name PEFT compares when it adds another adapter;
they get an attribute `forward`, as accelerate's hooks do it.

Quantised experts need no such call: their adapters have no other path (peft_quantised.py).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_ops._core.sharded import is_parallel, is_sharded
from moe_ops.integrations import peft_quantised
from moe_ops.integrations.default_experts import IMPLEMENTATION
from moe_ops.integrations.patch import MethodPatch
from moe_ops.integrations.quantised_experts import check_implementation, up_name
from moe_ops.integrations.requirements import check_version, missing
from moe_ops.integrations.transformers import (
    Experts,
    in_dtype_for,
    known_activation,
    weight_and_bias,
)
from moe_ops.layers.experts_modules import is_interface_experts
from moe_ops.layers.functional import flattened, in_shape_of
from moe_ops.layers.lora import LoraWeights, lora_experts
from moe_ops.quantization import QuantizedWeight

__all__ = ["adapter_weights", "auto", "disable", "enable"]

MINIMUM_VERSION = "0.21"

_HERE = "moe_ops.integrations.peft"
try:
    import peft
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise missing(_HERE, "peft", MINIMUM_VERSION, error) from error
check_version(_HERE, peft, MINIMUM_VERSION)

logger = logging.getLogger("moe_ops")


def enable(model: nn.Module) -> list[str]:
    """Compute the LoRA adapters of a model's experts beside the frozen weights, not merged into them.

        y = base(x) + sum over active adapters of scaling * (x @ lora_A[e].T) @ lora_B[e].T

    for the targeted ones of gate_up_proj (up_proj without a gate) and down_proj, with the model's
    own activation between them. Call it once, after PEFT has wrapped the model and before
    torch.compile; adapters that are added later are included. The experts must run with
    `experts_implementation="moe_ops"`.

    What split LoRA does not cover goes through PEFT's own, merged path, and the logger "moe_ops" says
    why, once for each reason: experts that run on another implementation, targeted biases, weights that
    another library quantised or that are sharded, experts with a norm of their own, and hooks on
    modules that would be passed by. PEFT itself refuses dropout, DoRA and an adapter for each sample
    where parameters are adapted.

    A QuantizedWeight is not merged, so for its adapters the forward raises a ValueError there. They
    are enabled when PEFT adds them: this call then only returns their names.

    Where no adapter sits on the experts, there is nothing to do: the logger "moe_ops" says so once.

    Args:
        model: a PeftModel, or any module that holds one's layers.

    Returns:
        names: of the experts modules that split LoRA computes from now on.

    Raises:
        ImportError: on import of this module, if peft is missing or older than 0.21.
        ValueError: PEFT has wrapped the experts after expert_parallel.

    Source: PEFT's ParamWrapper, peft/tuners/lora/layer.py, for what its adapters mean.
    """
    wrappers = dict(_outermost_wrappers(model))
    if not wrappers:
        _log_once(
            "enable: expected a model with LoRA adapters on its experts, got "
            f"{type(model).__name__} without: nothing to do; pass peft "
            "LoraConfig(target_parameters=[...])"
        )
    return _enable(wrappers)


def auto(on: bool = True) -> None:
    """Call enable() for every adapter that PEFT adds from now on, or stop doing so.

    It holds for the process: for get_peft_model, PeftModel.from_pretrained, add_adapter,
    load_adapter, and transformers' own model.add_adapter, also where they were imported before.
    Adapters that sit on no experts are left to PEFT without a word. Models that are wrapped already
    stay as they are.

    Args:
        on: False undoes auto(): PEFT is as it was, and models that were enabled stay so until
            disable(). Calling it twice changes nothing.

    Raises:
        ImportError: on import of this module, if peft is missing or older than 0.21.

    Source: PEFT's BaseTuner.inject_adapter, peft/tuners/tuners_utils.py, through which all of them go.
    """
    _state.auto = on
    _patch()


def support_quantised(on: bool) -> None:
    """Let PEFT adapt the weights of quantised experts from now on, or stop doing so.

    The integration of transformers calls it for whoever quantises experts.
    """
    _state.quantised = on
    _patch()


def attach(model: nn.Module) -> None:
    """Give wrappers whose experts have been quantised after PEFT had wrapped them our forward."""
    _enable(_quantised(dict(_outermost_wrappers(model))))


@dataclasses.dataclass
class _State:
    """What auto() and support_quantised() made of this process."""

    auto: bool = False
    quantised: bool = False


_state = _State()


def _patch() -> None:
    if _state.auto or _state.quantised:
        _inject_patch.install(BaseTuner)
        _merge_patch.install(LoraModel)
    else:
        _inject_patch.remove()
        _merge_patch.remove()


def _inject_and_enable(
    original: Callable[..., None], self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any
) -> None:
    with peft_quantised.stand_ins(model):
        original(self, model, *args, **kwargs)
    wrappers = dict(_outermost_wrappers(model))
    _enable(wrappers if _state.auto else _quantised(wrappers))


_inject_patch = MethodPatch("inject_adapter", _inject_and_enable)
_merge_patch = MethodPatch("_check_merge_allowed", peft_quantised.check_merge_allowed)


def _quantised(wrappers: dict[str, ParamWrapper]) -> dict[str, ParamWrapper]:
    return {name: w for name, w in wrappers.items() if any(map(_is_quantised, _chain(w)))}


def _is_quantised(wrapper: ParamWrapper) -> bool:
    return isinstance(peft_quantised.adapted_weight(wrapper), QuantizedWeight)


def _enable(wrappers: dict[str, ParamWrapper]) -> list[str]:
    """Give outermost wrappers our forward. Return the names of those that it computes split.

    Raises:
        ValueError: PEFT has wrapped experts that were spread over ranks.
    """
    enabled = []
    for name, wrapper in wrappers.items():
        if is_parallel(wrapper):
            # expert_parallel took its forward over.
            enabled.append(name)
            continue
        if is_parallel(wrapper.get_base_layer()):
            raise ValueError(
                f"{_HERE}: expected adapters that PEFT added before expert_parallel, got "
                f"some around {name}, whose experts are spread over ranks already; wrap the model first"
            )
        reason = _obstacle(list(_chain(wrapper)), runs=False)
        if "forward" in wrapper.__dict__ and not _is_ours(wrapper):
            reason = f"the wrapper of {name} has a forward of its own"
        else:
            # Not a method, which would be pickled as the class's own forward. Expert parallelism puts
            # a view of this rank's experts in the place of the first argument alone.
            wrapper.__dict__["forward"] = functools.partial(forward, wrapper, switches=wrapper)
        for inner in filter(_is_quantised, _chain(wrapper)):
            inner.__dict__["merge"] = functools.partial(peft_quantised.merge, inner)
        if reason is None:
            enabled.append(name)
        elif not any(map(_is_quantised, _chain(wrapper))):
            _log_merged(reason)
    return enabled


def disable(model: nn.Module) -> None:
    """Give the wrappers that enable() changed PEFT's own forward back.

    Those of quantised experts keep ours, since PEFT's own cannot compute them.

    Args:
        model: what enable() was called with.
    """
    for _, wrapper in _outermost_wrappers(model):
        if _is_ours(wrapper) and not any(map(_is_quantised, _chain(wrapper))):
            del wrapper.__dict__["forward"]


def forward(
    self: ParamWrapper,
    hidden_states: Tensor,
    *args: Any,
    switches: ParamWrapper,
    **kwargs: Any,
) -> Tensor:
    """Compute PEFT's wrapper around an experts module: split where possible, else PEFT's own way.

    Args:
        self: the outermost wrapper of the experts module, or its view of this rank's experts.
        hidden_states ((..., hidden_size), floating): rows in token order.
        *args: top_k_index and top_k_weights, as transformers gives them to its experts.
        switches: the wrapper itself, which knows what PEFT has activated, switched off or merged.
        **kwargs: adapter_names, which PEFT may give.

    Returns:
        hidden_states ((..., hidden_size), the dtype of hidden_states): the weighted sum of each
            token's experts.

    Raises:
        ValueError: the experts are spread over ranks, and adapters cannot be computed beside them.
    """
    wrappers, told = list(_chain(self)), list(_chain(switches))
    if self is not switches:
        return _spread(wrappers, told, hidden_states, *args, **kwargs)
    if not _is_merged_in_part(wrappers):
        reason = _obstacle_of_call(wrappers, args, kwargs)
        if reason is None:
            return _split(wrappers, [_active(w) for w in wrappers], hidden_states, *args)
        if any(map(_is_quantised, wrappers)):
            peft_quantised.refuse(reason)
        # Dynamo would break the graph there, and enable() has said what does not change.
        if not torch.compiler.is_compiling():
            _log_merged(reason)
    output: Tensor = ParamWrapper.forward(self, hidden_states, *args, **kwargs)
    return output


def _spread(
    wrappers: list[ParamWrapper],
    told: list[ParamWrapper],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Compute this rank's experts, as `wrappers` shows them, with the adapters that PEFT has active.

    PEFT's own way would read the switches of the view, which nobody sets.
    """
    for wrapper in told:
        if wrapper.disable_adapters and wrapper.merged:
            # As PEFT does it, in the weights of all ranks.
            wrapper.unmerge()
    added = [[] if w.disable_adapters or w.merged else _active(w) for w in told]
    if not any(added):
        output: Tensor = wrappers[-1].base_layer(hidden_states, *args, **kwargs)
        return output
    reason = _obstacle_of_call(wrappers, args, kwargs)
    if reason is not None:
        raise ValueError(
            f"{_HERE}: expected adapters that can be computed beside experts that are spread over "
            f"ranks, got an obstacle: {reason}"
        )
    return _split(wrappers, added, hidden_states, *args)


def _active(wrapper: ParamWrapper) -> list[str]:
    """Return the active adapters that a wrapper has."""
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def adapter_weights(wrapper: ParamWrapper, adapter_name: str) -> LoraWeights:
    """Return one adapter of PEFT's wrapper, as moe_ops.layers.lora takes it.

    PEFT packs the adapters of all experts into two linear layers: lora_A.weight
    (num_experts * rank, in_features) has the experts slowest, lora_B.weight (out_features,
    rank * num_experts) has them fastest.

    Args:
        wrapper: a wrapper of a parameter (num_experts, out_features, in_features), or of its
            transpose in experts with is_transposed.
        adapter_name: one of its adapters.

    Returns:
        weights: lora_A (num_experts, rank, in_features) and lora_B (num_experts, out_features, rank),
            views of PEFT's parameters, and PEFT's scaling. scaling * lora_B[e] @ lora_A[e] is
            wrapper.get_delta_weight(adapter_name)[e], transposed where the experts are.
    """
    lora_a, lora_b = wrapper.lora_A[adapter_name], wrapper.lora_B[adapter_name]
    assert isinstance(lora_a, nn.Linear)
    assert isinstance(lora_b, nn.Linear)
    return LoraWeights(
        lora_a.weight.unflatten(0, (wrapper.num_experts, -1)),
        lora_b.weight.unflatten(1, (-1, wrapper.num_experts)).permute(2, 0, 1),
        wrapper.scaling[adapter_name],
    )


def _split(
    wrappers: list[ParamWrapper],
    added: list[list[str]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute the experts, and beside each adapted weight the adapters of these names."""
    experts = cast(Experts, wrappers[-1].base_layer)
    adapters = {
        wrapper.parameter_name: [adapter_weights(wrapper, name) for name in names]
        for wrapper, names in zip(wrappers, added, strict=True)
    }
    up_weight, up_bias = weight_and_bias(experts, up_name(experts), hidden_states)
    down_weight, down_bias = weight_and_bias(experts, "down_proj", hidden_states)
    tokens, topk_ids, topk_weights = flattened(hidden_states, top_k_index, top_k_weights)
    known = known_activation(experts)
    own = experts._apply_gate if experts.has_gate else experts.act_fn
    output = lora_experts(
        in_dtype_for(up_weight, tokens),
        up_weight,
        down_weight,
        topk_ids,
        topk_weights,
        adapters.get(up_name(experts), ()),
        adapters.get("down_proj", ()),
        up_bias,
        down_bias,
        own if known is None else known.name,
        gated=known is None or known.gated,
        interleaved=known is not None and known.interleaved,
        activation_limit=None if known is None else known.limit,
    )
    return in_shape_of(hidden_states, output).to(hidden_states.dtype)


def _is_merged_in_part(wrappers: list[ParamWrapper]) -> bool:
    """Tell whether no adapter is to be added here, or PEFT has merged one already."""
    return not any(map(_active, wrappers)) or any(w.disable_adapters or w.merged for w in wrappers)


def _obstacle_of_call(
    wrappers: list[ParamWrapper], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Say why this call cannot go through split LoRA; None where it can."""
    reason = _obstacle(wrappers)
    if reason is None and (kwargs or len(args) != 2):
        reason = "the experts were called with other arguments than transformers gives them"
    return reason


def _obstacle(wrappers: list[ParamWrapper], *, runs: bool = True) -> str | None:
    """Say why these wrappers, outermost first, cannot go through split LoRA; None where they can.

    Unless the layer runs, a sharded weight is no obstacle: fully_shard gathers it before it runs.
    """
    experts = wrappers[-1].base_layer
    name = type(experts).__name__
    if not is_interface_experts(experts):
        return f"{name} does not go through transformers' experts interface"
    implementation = getattr(experts.config, "_experts_implementation", None)
    if implementation != IMPLEMENTATION:
        return f'{name} runs with experts_implementation="{implementation}"'
    if getattr(experts, "has_post_expert_norm", False):
        return f"{name} has a norm after each expert"
    # PEFT's own path runs no hooks on the adapters either.
    for module in [*wrappers[1:], experts]:
        if _is_hooked(module):
            return f"{type(module).__name__} in {name} has hooks or a forward of its own"
    for parameter in (up_name(experts), "down_proj"):
        weight = getattr(experts, parameter)
        if isinstance(weight, QuantizedWeight):
            continue
        # Under expert parallelism it is this rank's part, which is no parameter.
        is_whole = type(weight) in (nn.Parameter, Tensor) or (not runs and is_sharded(weight))
        if not is_whole or weight.dtype not in _DTYPES:
            return f"{parameter} of {name} is {type(weight).__name__} of {weight.dtype}"
    for wrapper in wrappers:
        parameter = wrapper.parameter_name
        if parameter not in (up_name(experts), "down_proj"):
            return f"{parameter} of {name} is adapted"
    return None


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or any(hook is not check_implementation for hook in module._forward_pre_hooks.values())
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _chain(wrapper: nn.Module) -> Iterator[ParamWrapper]:
    """Yield the wrapper and those nested in it, one per adapted parameter, outermost first."""
    while isinstance(wrapper, ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _outermost_wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """Yield the wrappers of experts in the model, with their names."""
    inner = {id(nested) for m in model.modules() for nested in list(_chain(m))[1:]}
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or id(module) in inner:
            continue
        # PEFT wraps parameters of any module, such as the weight of a linear layer.
        is_experts = is_interface_experts(module.get_base_layer())
        if is_experts or peft_quantised.adapted_weight(module).ndim == 3:
            yield name, module


def _is_ours(wrapper: ParamWrapper) -> bool:
    return getattr(wrapper.__dict__.get("forward"), "func", None) is forward


def _log_merged(reason: str) -> None:
    _log_once(f"PEFT's own path merges the adapters: {reason}")


@functools.cache
def _log_once(text: str) -> None:
    logger.warning("%s: %s", _HERE, text)
