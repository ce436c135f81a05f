# SPDX-License-Identifier: Apache-2.0
"""Find the experts modules of a model: ours, and those of transformers' experts interface.

transformers is not imported. What it writes on its experts modules tells them from others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_ops.layers.experts import Experts
from moe_ops.layers.lora import LoraExperts


def experts_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the experts modules of a model with their names; of nested ones the outermost."""
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inner and is_experts(base_of(module)):
            inner.update(module.modules())
            yield name, module


def num_experts_of(module: nn.Module) -> int:
    """Return the number of experts of an experts module."""
    base: Any = base_of(module)
    return int(base.down_proj.shape[0] if _is_ours(base) else base.num_experts)


def base_of(module: Any) -> nn.Module:
    """Return what PEFT's wrappers, if any, are around."""
    while is_peft_wrapper(module):
        module = module.base_layer
    result: nn.Module = module
    return result


def is_peft_wrapper(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's wrapper around one that has an adapted parameter."""
    return hasattr(module, "parameter_name") and hasattr(module, "base_layer")


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module is an experts module itself."""
    return _is_ours(module) or is_interface_experts(module)


def is_interface_experts(module: nn.Module) -> bool:
    """Tell whether a module goes through transformers' experts interface."""
    # torch.compile's wrapper shows the attributes of what it wraps.
    return (
        hasattr(module, "is_transposed") and hasattr(module, "has_gate") and not is_compiled(module)
    )


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is torch.compile's wrapper around another."""
    return hasattr(module, "_orig_mod")


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (Experts, LoraExperts))
