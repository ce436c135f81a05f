# SPDX-License-Identifier: Apache-2.0
"""Ask FSDP2 whether it manages a module's parameters.

Expert gradients are sums over the ranks of the expert-parallel group. FSDP2 takes means over its own
ranks. Under both, all gradients are to be the mean over all ranks, so those of experts are divided by
the size of the expert-parallel group besides. A parameter does not say that FSDP2 has gathered it, and
a module does not know the modules around it, which fully_shard may have been called on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# torch keeps the state of fully_shard here, and has no public way to it from a parameter.
from torch.distributed._composable_state import _module_state_mapping


class GradientDivisor:
    """Know by what the gradients of a module's parameters are divided.

    Args:
        module: it holds parameters.
        world_size: the size of the expert-parallel group.
    """

    def __init__(self, module: nn.Module, world_size: int) -> None:
        self.module = module
        self.world_size = world_size
        self._states: tuple[Any, ...] | None = None
        self._group: Any = None

    def number(self) -> int:
        """Return the group's size under FSDP2, else 1.

        It is 1 too where somebody has called set_gradient_divide_factor for the parameters.
        """
        # Weak references: those of modules that are gone stay different from any other.
        states = tuple(_module_state_mapping.values())
        if self._states is None or not _are_same(self._states, states):
            self._states = states
            self._group = _group_of(self.module)
        if self._group is None or self._group.gradient_divide_factor is not None:
            return 1
        return self.world_size


def asking(divisor: GradientDivisor) -> Callable[[], int]:
    """Return a function that returns divisor.number(), for `constant_of`.

    torch.compile guards a function by its code, and an object by its identity. So layers that are
    compiled one by one share one graph if they hold functions. A bound method counts as an object.
    """

    def ask() -> int:
        return divisor.number()

    return ask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant_of(ask: Callable[[], int]) -> int:
    """Return what `ask` returns, which compiled code takes as it is when it is compiled."""
    return ask()


def is_managed(module: nn.Module) -> bool:
    """Return whether fully_shard was called on the module or on one around it.

    fully_shard writes this for torch.compile, which guards it.
    """
    return "_is_fsdp_managed_module" in module.__dict__


def _are_same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _group_of(module: nn.Module) -> Any:
    """Return the group of parameters in which FSDP2 has the module's, or None."""
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        for group in _groups(state):
            infos = [param._module_info for param in group.fsdp_params]
            if any(module is info.module or module in info.shared_modules for info in infos):
                return group
    return None


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        # Before torch 2.12 there is one.
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
