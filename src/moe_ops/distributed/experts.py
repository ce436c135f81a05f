# SPDX-License-Identifier: Apache-2.0
"""What an experts module is, and what is refused of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from moe_ops.layers import Experts
from moe_ops.layers.lora import GroupedLora, LoraExperts
from moe_ops.quantization import QuantizedWeight


def experts_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the experts modules of a model with their names; of nested ones the outermost."""
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inner and _is_experts(_base(module)):
            inner.update(module.modules())
            yield name, module


def check_experts(function: str, module: nn.Module) -> None:
    """Refuse a module that expert parallelism does not take.

    Raises:
        ValueError: it is no experts module, it is parallel already, or it runs on another
            implementation than "moe_ops".
    """
    base = _base(module)
    if not _is_experts(base):
        raise ValueError(
            f"{function}: expected an experts module (moe_ops.layers.MoE, Experts or LoraExperts, or "
            f"one of transformers' experts interface), got a {type(module).__name__}; name it in the "
            'plan, as {"layers.*.mlp.experts": ExpertParallel()}'
        )
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            f"{function}: expected a {type(module).__name__} of plain parameters, got DTensors; apply "
            "ExpertParallel once, and before fully_shard"
        )
    implementation = getattr(getattr(base, "config", None), "_experts_implementation", "moe_ops")
    if implementation != "moe_ops":
        raise ValueError(
            f'{function}: expected experts that run with experts_implementation="moe_ops", got '
            f'{implementation!r}; call model.set_experts_implementation("moe_ops")'
        )


def num_experts_of(module: nn.Module) -> int:
    """Return the number of experts of an experts module."""
    base: Any = _base(module)
    return int(base.down_proj.shape[0] if _is_ours(base) else base.num_experts)


def holds_experts(module: nn.Module) -> bool:
    """Tell whether the first dimension of a module's own tensors may be that of all experts."""
    return _is_experts(module) or isinstance(module, (GroupedLora, QuantizedWeight))


def _base(module: Any) -> nn.Module:
    """Return what PEFT's wrappers, if any, are around."""
    while is_peft_wrapper(module):
        module = module.base_layer
    result: nn.Module = module
    return result


def is_peft_wrapper(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's wrapper around one that has an adapted parameter."""
    return hasattr(module, "parameter_name") and hasattr(module, "base_layer")


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (Experts, LoraExperts))


def _is_experts(module: nn.Module) -> bool:
    return _is_ours(module) or (hasattr(module, "is_transposed") and hasattr(module, "has_gate"))
