# SPDX-License-Identifier: Apache-2.0
"""Views of experts modules that see the experts of this rank alone.

An experts module keeps its parameters, which are DTensors over all experts. What computes must see
plain tensors of this rank's experts. A forward that swaps them in the module and back would be a side
effect, which torch.compile refuses under activation checkpointing. So there is a second object beside
the module, of a subclass of its class, that reads each parameter from the module when it is asked for,
and returns its local part.

What code writes to `self` in a forward, it writes to the view. The module does not see it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_ops.distributed.fsdp import GradientDivisor, asking, constant_of, is_managed
from moe_ops.layers.experts_modules import is_peft_wrapper
from moe_ops.quantization import QuantizedWeight

# What nn.Module keeps of itself. All else is read from the module, as it is then, but for submodules,
# which have views of their own.
_OWN = frozenset(nn.Module().__dict__) - {"training"}


class _ScaleGradient(torch.autograd.Function):
    """Pass a tensor on, and multiply its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Local:
    """What makes a subclass of a module's class a view of the module.

    Attributes:
        _source: the module, in a tuple, else nn.Module would register it.
        _divisor: a function that returns by what the gradients of its parameters are divided.
        _world_size: what the divisor was made with.
        _sharded: names of the module's own parameters that hold the experts of all ranks.
    """

    _source: tuple[nn.Module]
    _divisor: Callable[[], int]
    _world_size: int
    _sharded: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        (source,) = self.__dict__["_source"]
        state = source.__dict__
        for kind in ("_parameters", "_buffers"):
            if name in state[kind]:
                return self._local(name, state[kind][name])
        if name in state:
            return state[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        view: _Local = object.__new__(type(self))
        memo[id(self)] = view
        view.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # A copy of a function would still ask about this view's module.
        (source,) = view.__dict__["_source"]
        view.__dict__["_divisor"] = asking(GradientDivisor(source, self.__dict__["_world_size"]))
        return view

    def _local(self, name: str, tensor: Tensor | None) -> Tensor | None:
        if not isinstance(tensor, DTensor):
            if name in self.__dict__["_sharded"]:
                # It would be taken for this rank's experts, and has those of all ranks.
                raise TypeError(
                    f"moe_ops.distributed: expected {name} to be the DTensor that expert_parallel "
                    f"made, got {type(tensor).__name__}; do not assign plain tensors: load with "
                    "torch.distributed.checkpoint.state_dict.set_model_state_dict(model, state, "
                    "options=StateDictOptions(full_state_dict=True))"
                )
            if tensor is not None and tensor.requires_grad:
                self._check_shared(name)
            return tensor
        local = tensor.to_local()
        if not local.requires_grad or not is_managed(self.__dict__["_source"][0]):
            return local
        number = constant_of(self.__dict__["_divisor"])
        if number == 1:
            return local
        scaled: Tensor = _ScaleGradient.apply(local, 1 / number)  # type: ignore[no-untyped-call]
        return scaled

    def _check_shared(self, name: str) -> None:
        """Refuse to train under FSDP2 what all experts share, such as an activation's parameter.

        Its gradient is of the rows that reached this rank, and FSDP2 sums over other ranks.
        """
        (source,) = self.__dict__["_source"]
        if self.__dict__["_world_size"] > 1 and is_managed(source):
            raise ValueError(
                f"moe_ops.distributed: expected {name} of {type(source).__name__} to be frozen under "
                "fully_shard, got a trainable parameter that all experts share, whose gradient would "
                "be of this rank's experts alone; freeze it"
            )


def local_view(module: nn.Module, num_local: int, world_size: int) -> nn.Module:
    """Return a view of an experts module, and of all modules in it, on this rank's experts.

    Args:
        module: its parameters are DTensors, by now or at the time of a call.
        num_local: what the view's num_experts says, where the module has one.
        world_size: the number of ranks that have experts.
    """
    view: nn.Module = object.__new__(_local_class(type(module)))  # type: ignore[arg-type]
    own: Mapping[str, Any] = {key: module.__dict__[key] for key in _OWN if key in module.__dict__}
    view.__dict__.update(own, _parameters={}, _buffers={}, _source=(module,))
    view.__dict__["_divisor"] = asking(GradientDivisor(module, world_size))
    view.__dict__["_world_size"] = world_size
    parameters: Mapping[str, Any] = module._parameters
    view.__dict__["_sharded"] = frozenset(
        name for name, tensor in parameters.items() if isinstance(tensor, DTensor)
    )
    view.__dict__["_modules"] = {
        name: None if child is None else local_view(child, num_local, world_size)
        for name, child in module._modules.items()
    }
    if isinstance(getattr(module, "num_experts", None), int):
        view.__dict__["num_experts"] = num_local
    if isinstance(module, QuantizedWeight):
        view.__dict__["shape"] = torch.Size((num_local, *module.shape[1:]))
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial):
        # A forward that was given to the module alone, as moe_ops.integrations.peft does it.
        rebound = (view if argument is module else argument for argument in forward.args)
        view.__dict__["forward"] = functools.partial(forward.func, *rebound, **forward.keywords)
    return view


_Hiding = tuple[nn.Module, nn.Module, tuple[str, ...]]


def hiding(view: nn.Module) -> tuple[_Hiding, ...]:
    """Return what `follow` looks at: each view, its module, and where the class has a default.

    A module's value may hide the default of its class. The view has no value of its own, so it would
    keep to the default.
    """
    found = []
    for part in view.modules():
        (source,) = part.__dict__["_source"]
        # moe_ops.integrations.peft asks PEFT's wrapper itself for its switches.
        names = () if is_peft_wrapper(source) else _defaults(type(source))  # type: ignore[arg-type]
        if names:
            found.append((part, source, names))
    return tuple(found)


_Children = tuple[tuple[nn.Module, nn.Module], ...]


def children(view: nn.Module) -> _Children:
    """Return what `check_children` looks at: each view that has submodules, and its module."""
    parts = ((part, part.__dict__["_source"][0]) for part in view.modules())
    return tuple((part, source) for part, source in parts if source._modules)


def check_children(function: str, pairs: _Children) -> None:
    """Refuse a module whose submodules are other ones than its view's.

    Raises:
        ValueError: one was added, deleted or replaced.
    """
    for view, source in pairs:
        there, now = view._modules, source._modules
        if there.keys() != now.keys() or any(
            child is not None and child.__dict__["_source"][0] is not now[name]
            for name, child in there.items()
        ):
            raise ValueError(
                f"{function}: expected {type(source).__name__} with the submodules that it had at "
                f"expert_parallel ({', '.join(there)}), got others ({', '.join(now)}); add, delete "
                "and replace adapters and other submodules before it"
            )


def follow(pairs: tuple[_Hiding, ...]) -> None:
    """Give views the values that hide defaults of their classes, as they are now."""
    for view, source, names in pairs:
        for name in names:
            now = getattr(source, name)
            # Dynamo takes an assignment for a side effect, so there is none where nothing changed.
            if now is not getattr(view, name):
                setattr(view, name, now)


@functools.cache
def _defaults(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of plain values that a class has, but for nn.Module's own."""
    names = sorted(set(dir(cls)).difference(dir(nn.Module), ("num_experts",)))
    values = {name: inspect.getattr_static(cls, name) for name in names if name[:2] != "__"}
    return tuple(name for name, value in values.items() if not hasattr(type(value), "__get__"))


def own_methods(module: nn.Module) -> list[str]:
    """Return the methods of its class that a module has replaced for itself alone."""
    of_class = {name: inspect.getattr_static(type(module), name, 0) for name in module.__dict__}
    return [name for name, value in of_class.items() if hasattr(type(value), "__get__")]


@functools.cache
def _local_class(cls: type[nn.Module]) -> type[nn.Module]:
    # The same name: transformers' classes are recognised by it.
    return type(cls.__name__, (_Local, cls), {"__module__": cls.__module__})
