# SPDX-License-Identifier: Apache-2.0
"""Quantise the experts of a transformers model in place, and make them plain again.

An experts module then has a QuantizedWeight where it had a parameter: always (num_experts,
out_features, in_features), also in modules that store their weights transposed. Its class, its biases
and its activation stay. experts_forward computes it; a hook refuses every other implementation.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._core.checks import check_weight_dtype
from moe_ops._core.sharded import refuse_sharded
from moe_ops.integrations import peft_hook
from moe_ops.integrations.default_experts import IMPLEMENTATION
from moe_ops.integrations.transformers_private import mark_initialized
from moe_ops.layers.experts_modules import is_interface_experts
from moe_ops.quantization import QuantizedWeight, quantize_weight
from moe_ops.quantization.storage import layout_of

_HERE = "moe_ops.integrations.transformers"


def quantize_experts_(
    model: nn.Module,
    format: str,
    modules: Sequence[str] | None = None,
    *,
    group_size: int | None = None,
) -> list[str]:
    """Quantise the experts of a model in place, one projection after the other.

    Routers, shared experts, attention and everything else stay as they are, and so do the experts'
    biases. The experts then compute with `experts_implementation="moe_ops"` alone, are frozen, and take
    LoRA adapters (moe_ops.integrations.peft). save_pretrained and from_pretrained keep them.

    It quantises one expert at a time, and frees each projection before the next one. So beside the
    model it takes the bytes of one quantised projection, and a few times one expert's.

    Args:
        model: a model of transformers, or any module that holds its experts.
        format (str): "fp8_block", "nf4", "mxfp4" or "int4", as of moe_ops.quantize_weight.
        modules (sequence of str or None): names of experts modules, or their ends, such as
            "layers.0.mlp.experts"; `*` stands for any letters. None quantises all.
        group_size (int or None): as of moe_ops.quantize_weight.

    Returns:
        names: of the experts modules that were quantised.

    Raises:
        ValueError: an unknown format or group_size; no experts; a name that fits none of them; experts
            that are quantised already. The model then is as it was.
        TypeError: no module; weights that are not parameters of 16 bits or more.
    """
    function = f"{_HERE}.quantize_experts_"
    _check_model(function, model)
    layout_of(function, format, (0, 0, 0), group_size)
    chosen = chosen_experts(function, model, modules)
    for name, experts in chosen.items():
        for weight_name in weight_names(experts):
            _check_plain(function, f"{name}.{weight_name}", getattr(experts, weight_name))
    for experts in chosen.values():
        for name in weight_names(experts):
            set_quantized(
                experts, name, quantized(experts, getattr(experts, name), format, group_size)
            )
    _after_change(model)
    return list(chosen)


def dequantize_experts_(
    model: nn.Module, modules: Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Make quantised experts plain again, in place: frozen parameters, in their class's own layout.

    A model with LoRA adapters can then merge them, as PEFT does it.

    Args:
        model: as of quantize_experts_.
        modules: as of quantize_experts_. None dequantises all that are quantised.
        dtype (torch.dtype or None): of the parameters, or each weight's own, its `.dtype`.

    Returns:
        names: of the experts modules that were dequantised.

    Raises:
        ValueError: no quantised experts, or a name that fits none of them.
        TypeError: no module; experts that are spread over ranks; a dtype that no weight has. The model
            then is as it was.
    """
    function = f"{_HERE}.dequantize_experts_"
    _check_model(function, model)
    if dtype is not None:
        check_weight_dtype(function, dtype)
    found = {n: e for n, e in experts_modules(model).items() if quantized_weights(e)}
    chosen = _chosen(function, "quantised experts", found, model, modules)
    for at, experts in chosen.items():
        for name, weight in quantized_weights(experts).items():
            refuse_sharded(function, f"{at}.{name}.codes", weight.codes, "dequantise the model")
    for experts in chosen.values():
        for name, weight in quantized_weights(experts).items():
            values = weight.dequantize(dtype)
            delattr(experts, name)
            values = turned(experts, values).contiguous()
            setattr(experts, name, nn.Parameter(values, requires_grad=False))
        for key, hook in list(experts._forward_pre_hooks.items()):
            if hook is check_implementation:
                del experts._forward_pre_hooks[key]
    _after_change(model)
    return list(chosen)


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return the experts modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if is_interface_experts(module)}


def weight_names(experts: Any) -> tuple[str, str]:
    """Return the names of the two weights of an experts module."""
    return up_name(experts), "down_proj"


def up_name(experts: Any) -> str:
    """Return the name of an experts module's up projection."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def turned(experts: Any, weight: Tensor) -> Tensor:
    """Turn a weight from its class's layout to (num_experts, out_features, in_features), or back."""
    return weight.transpose(1, 2) if experts.is_transposed else weight


def quantized_weights(experts: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantised weights of an experts module, by name: the up projection first.

    PEFT nests its wrappers in the order of parameters, and every class has them in this one. While a
    checkpoint is loaded they may have come in another.
    """
    found = {n: w for n, w in experts.named_children() if isinstance(w, QuantizedWeight)}
    return dict(sorted(found.items(), key=lambda item: item[0] == "down_proj"))


def quantized(experts: Any, weight: Tensor, format: str, group_size: int | None) -> QuantizedWeight:
    """Quantise a weight of an experts module, in the module's own layout."""
    return quantize_weight(turned(experts, weight.detach()), format, group_size)


def set_quantized(experts: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a quantised weight where an experts module has a parameter, or another quantised weight."""
    delattr(experts, name)
    setattr(experts, name, weight.train(experts.training))
    mark_initialized(weight)
    if check_implementation not in experts._forward_pre_hooks.values():
        experts.register_forward_pre_hook(check_implementation)


def check_implementation(experts: Any, args: object) -> None:  # noqa: ARG001 - a hook's
    """Refuse to compute quantised experts with another implementation than ours.

    It is a forward pre-hook, since transformers' implementations read the weights as tensors.

    Raises:
        ValueError: the model has another experts implementation.
    """
    implementation = getattr(experts.config, "_experts_implementation", None)
    if implementation != IMPLEMENTATION:
        formats = sorted({weight.format for weight in quantized_weights(experts).values()})
        raise ValueError(
            f'{_HERE}: expected experts_implementation == "{IMPLEMENTATION}", since the weights of '
            f"{type(experts).__name__} are quantised ({', '.join(formats)}), got {implementation!r}; call "
            f'model.set_experts_implementation("{IMPLEMENTATION}"), or dequantize_experts_(model)'
        )


def chosen_experts(
    function: str, model: nn.Module, modules: Sequence[str] | None
) -> dict[str, Any]:
    """Return the experts modules that `modules` names, by name.

    Raises:
        ValueError: there are none, or a name fits none of them.
    """
    return _chosen(function, "experts", experts_modules(model), model, modules)


def names_in(function: str, modules: Sequence[str] | None) -> list[str] | None:
    """Return the names that `modules` has, or None for None.

    Raises:
        TypeError: it is no sequence of names.
    """
    if modules is None:
        return None
    if isinstance(modules, str) or not hasattr(modules, "__iter__"):
        raise TypeError(f"{function}: expected modules to be a sequence of names, got {modules!r}")
    names = list(modules)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{function}: expected modules to be names, got {name!r}")
    return names


def fits(name: str, patterns: Sequence[str] | None) -> bool:
    """Tell whether a module's name, or its end, is one of the patterns. None fits every name."""
    return patterns is None or any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
        for pattern in patterns
    )


def _chosen(
    function: str,
    what: str,
    found: dict[str, Any],
    model: nn.Module,
    modules: Sequence[str] | None,
) -> dict[str, Any]:
    patterns = names_in(function, modules)
    if not found:
        raise ValueError(
            f"{function}: expected a model with {what} that go through transformers' experts "
            f"interface, got {type(model).__name__} without"
        )
    for pattern in patterns or ():
        if not any(fits(name, [pattern]) for name in found):
            raise ValueError(
                f"{function}: expected modules to name {what}, got {pattern!r}; they are "
                f"{', '.join(found)}"
            )
    return {name: experts for name, experts in found.items() if fits(name, patterns)}


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = "None" if model is None else type(model).__name__
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {got}")


def _check_plain(function: str, name: str, weight: Any) -> None:
    if isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"{function}: expected weights that are not quantised yet, got {name} in {weight.format}; "
            "call dequantize_experts_ on it first, or name other modules"
        )
    refuse_sharded(function, name, weight, "quantise the model")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        got = f"{weight.dtype} in {type(weight).__name__}" if isinstance(weight, Tensor) else weight
        raise TypeError(
            f"{function}: expected {name} to be a parameter in bfloat16, float16, float32 or float64, "
            f"got {got}"
        )


def _after_change(model: nn.Module) -> None:
    """Let transformers and PEFT know which experts are quantised."""
    if "transformers" in sys.modules:
        from moe_ops.integrations import quantizer

        quantizer.record(model)
    peft_hook.install(model)
