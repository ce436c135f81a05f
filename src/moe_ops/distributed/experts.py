# SPDX-License-Identifier: Apache-2.0
"""Which experts modules expert parallelism takes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from moe_ops.distributed.local import own_methods
from moe_ops.layers.experts_modules import base_of, is_compiled, is_experts, is_peft_wrapper
from moe_ops.layers.lora import GroupedLora
from moe_ops.quantization import QuantizedWeight

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def check_experts(function: str, module: nn.Module) -> None:
    """Refuse a module that expert parallelism does not take.

    Raises:
        ValueError: it is no experts module, compiled or parallel already; it has a method of its own, or
            runs on another implementation than "moe_ops"; PEFT's adapters around it would be merged, or
            are on something else than its weights.
    """
    if is_compiled(module):
        raise ValueError(
            f"{function}: expected experts that are not compiled yet, got those of torch.compile; "
            "compile after expert_parallel"
        )
    base = base_of(module)
    if not is_experts(base):
        raise ValueError(
            f"{function}: expected an experts module (moe_ops.layers.MoE, Experts or LoraExperts, or "
            f"one of transformers' experts interface), got {type(module).__name__}; name it in the "
            'plan, as {"layers.*.mlp.experts": ExpertParallel()}'
        )
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            f"{function}: expected plain parameters in {type(module).__name__}, got DTensors; apply "
            "ExpertParallel once, and before fully_shard"
        )
    for inner in module.modules():
        # PEFT's wrappers get their forward from moe_ops.integrations.peft.
        if not is_peft_wrapper(inner) and (own := own_methods(inner)):
            raise ValueError(
                f"{function}: expected {type(inner).__name__} with the methods of its class, got one "
                f"with its own {', '.join(own)}; put them into a subclass"
            )
    if is_peft_wrapper(module) and "forward" not in module.__dict__:
        raise ValueError(
            f"{function}: expected PEFT's adapters to be computed beside their experts, got some that "
            f"PEFT merges into {type(base).__name__}; call moe_ops.integrations.peft.enable(model) first"
        )
    for inner in filter(is_peft_wrapper, module.modules()):
        name: Any = inner.parameter_name
        if name not in _WEIGHTS:
            raise ValueError(
                f"{function}: expected PEFT's adapters on {', '.join(_WEIGHTS)}, got some on {name}, "
                "which have no dimension of experts; take it out of target_parameters"
            )
    check_implementation(function, base)


def check_implementation(function: str, base: nn.Module) -> None:
    """Refuse experts of transformers that run on another implementation than "moe_ops".

    Raises:
        ValueError: they do.
    """
    implementation = getattr(getattr(base, "config", None), "_experts_implementation", "moe_ops")
    if implementation != "moe_ops":
        raise ValueError(
            f'{function}: expected experts that run with experts_implementation="moe_ops", got '
            f'{implementation!r}; call model.set_experts_implementation("moe_ops")'
        )


def holds_experts(module: nn.Module) -> bool:
    """Tell whether the first dimension of a module's own tensors may be that of all experts."""
    return is_experts(module) or isinstance(module, (GroupedLora, QuantizedWeight))
