# SPDX-License-Identifier: Apache-2.0
"""Owns the one torch.library.Library and puts the ops into it.

A call goes through these kernels, outermost first. This file makes them, once, for every op:

    Autocast   casts the arguments that the schema marks with `autocast`, and nothing else
    Autograd   records an autograd.Function where a gradient is needed
    CPU, CUDA  checks the arguments, then calls the implementation that the table names
    Meta       checks the arguments, then returns empty outputs (FakeTensors use it too)

An op folder makes its `Op` and gives it implementations. Where the op is differentiable, the folder
also gives the formula of its gradient, in terms of other ops. ops/permute/op.py is a short example;
ops/fused_experts/op.py has all that there is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch.autograd import forward_ad

from moe_ops._core import codegen, flops, reference
from moe_ops._core.checks import check_tensor
from moe_ops._core.schema import OpSchema, load_all
from moe_ops._core.sharded import is_sharded
from moe_ops._core.torch_private import (
    AFTER_AUTOGRAD,
    any_requires_grad,
    below_autograd,
    forward_ad_is_on,
)

logger = logging.getLogger("moe_ops")

NAMESPACE = "moe"
SCHEMAS: dict[str, OpSchema] = load_all(importlib.resources.files("moe_ops.op_schemas"))
OPS: dict[str, Op] = {}

# Which implementations may serve a device, best first. "pytorch" is written in PyTorch alone.
# "triton" serves CPU tensors only in Triton's interpreter, for tests.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("pytorch", "triton"),
    "cuda": ("triton", "pytorch"),
}
# What records the calls of an implementation on a GPU, to replay later ones.
REPLAYS = {"triton": "moe_ops._triton.replay:Replays"}
# What compiles the kernels of a forward's first call on a GPU beside those of its backward.
FIRST_CALLS = {"triton": "moe_ops._triton.compiling:compiled_with_backward"}
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
ENVIRONMENT_VARIABLE = "MOE_OPS_IMPLEMENTATION"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """The implementation that serves an op on a device, and why it was chosen."""

    name: str
    reason: str


class Op:
    """An op of the namespace `moe`, defined by its schema in op_schemas/.

    Its folder makes it, once. Calling its `overload` calls the dispatcher, as
    `torch.ops.moe.permute(...)` does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.schema = SCHEMAS[name]
        self.generated = codegen.generate(self.schema)
        self.implementations: dict[str, Callable[..., Tensors] | str] = {}
        self.flags: dict[str, dict[str, Any]] = {}
        _library.define(
            name + self.schema.schema,
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
        )
        self.overload = getattr(torch.ops.moe, name).default
        torch.library.register_fake(
            f"{NAMESPACE}::{name}", self.generated.fake, lib=_library, allow_override=False
        )
        self.device_kernels = {
            key: _device_kernel(self, device_type) for device_type, key in DISPATCH_KEYS.items()
        }
        for key, kernel in self.device_kernels.items():
            self._impl(kernel, key)
        self._autograd: _Autograd | None = None
        # The _autograd of fused_experts on fused_experts_forward, which runs in its place where a
        # gradient is recorded; None for an op that runs in no other's place.
        self._outer_autograd: _Autograd | None = None
        self._impl(_autograd_kernel(self), "Autograd", with_keyset=True)
        for device_type, key in DISPATCH_KEYS.items():
            self._impl(_autocast_kernel(self, device_type), f"Autocast{key}")
        if self.generated.flops is not None:
            flops.register(getattr(torch.ops.moe, name), self.generated.flops)
        OPS[name] = self

    def __repr__(self) -> str:
        return f"Op({NAMESPACE}::{self.name})"

    def _impl(self, kernel: Callable[..., Any], key: str, with_keyset: bool = False) -> None:
        _library.impl(self.name, kernel, key, with_keyset=with_keyset, allow_override=False)

    def implement(self, name: str, function: Callable[..., Tensors] | str, **flags: Any) -> None:
        """Name `function` as the implementation `name`, "pytorch" or "triton".

        Args:
            name: what the table IMPLEMENTATIONS calls it.
            function: what a call runs. It gets all arguments: defaults that the caller left out are
                filled in. A string "module:function" is imported at the first call.
            flags: keywords that every call passes beyond the schema's arguments, so that two ops
                can share one function. The function takes each as a keyword-only parameter.
        """
        self.implementations[name] = function
        self.flags[name] = flags

    def differentiate(
        self,
        save: Callable[..., None],
        backward: Callable[..., Sequence[torch.Tensor | None]],
        forward: Op | None = None,
    ) -> None:
        """Give the op its gradient, in terms of other ops.

        Args:
            save: called with (ctx, arguments, outputs) after the forward. Defaults that the caller
                left out are filled in. ctx.needs says, argument by argument, whether its gradient
                is needed.
            backward: called with (ctx, *grad_outputs). A gradient may be None, but not all of them
                are. It returns a gradient or None for each argument, in the order of the schema.
                Trailing Nones may be left out. What it returns for an argument that needs no
                gradient is dropped.
            forward: the op that runs in place of this one where a gradient is recorded. It takes
                the same arguments. Its first outputs are this op's; `save` gets all of them.
        """
        num_outputs = len(self.schema.outputs)
        self._autograd = _Autograd(save, backward, forward or self, num_outputs)
        if forward is not None:
            forward._outer_autograd = self._autograd

    def in_backward(self, *args: Any) -> Any:
        """Call the op in the formula of a gradient.

        Without a second derivative its Autograd kernel would record nothing, and is skipped: that
        saves converting the arguments twice.
        """
        # Dynamo, which traces backwards for compiled autograd, does not know the guard.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad_is_on():
            return self.overload(*args)
        if _thread.is_rehearsing:
            return self._rehearse(args)
        with below_autograd():
            return self.overload(*args)

    def _rehearse(self, args: tuple[Any, ...]) -> Tensors:
        """Call our own implementation, whatever the dispatcher knows: the values mean nothing."""
        (device_type,) = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        implementation = self._load(self.choose(device_type).name)
        return implementation(*args, *self.defaults[len(args) :])

    def choose(self, device_type: str) -> Choice:
        """Return the implementation that serves `device_type`, or raise RuntimeError."""
        candidates = IMPLEMENTATIONS[device_type]
        obstacles = {name: self._obstacle(name, device_type) for name in candidates}
        forced = os.environ.get(ENVIRONMENT_VARIABLE)
        if forced:
            known = " or ".join(candidates)
            unknown = f"{device_type} tensors have no such implementation; expected {known}"
            obstacle = obstacles.get(forced, unknown)
            if obstacle is None:
                return Choice(forced, f"forced by {ENVIRONMENT_VARIABLE}")
            raise RuntimeError(
                f"{NAMESPACE}::{self.schema.called}: {ENVIRONMENT_VARIABLE}={forced}: {obstacle}"
            )
        best = candidates[0]
        for name, obstacle in obstacles.items():
            if obstacle is None:
                return Choice(name, "the default" if name == best else f"{obstacles[best]}")
        raise RuntimeError(f"{NAMESPACE}::{self.schema.called}: {obstacles[best]}")

    def _obstacle(self, name: str, device_type: str) -> str | None:
        """Return why the implementation cannot serve the device, or None if it can."""
        if name not in self.implementations:
            return f"this op has no {name} implementation"
        if name == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if name == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton serves CPU tensors only in its interpreter, TRITON_INTERPRET=1"
        return None

    def _load(self, name: str) -> Callable[..., Tensors]:
        """Return the implementation `name` with its flags bound."""
        function, flags = self.implementations[name], self.flags[name]
        if isinstance(function, str):
            function = cast(Callable[..., Tensors], function_of(function))
        return functools.partial(function, **flags) if flags else function

    @property
    def defaults(self) -> tuple[Any, ...]:
        return tuple(a.default for a in self.schema.arguments)


@dataclass(frozen=True)
class _Autograd:
    save: Callable[..., None]
    backward: Callable[..., Sequence[torch.Tensor | None]]
    forward: Op
    num_outputs: int

    def go_through_backward(self, args: tuple[Any, ...], forward: Callable[..., Tensors]) -> None:
        """Call a forward and what its backward would, with outputs in place of their gradients.

        The forward alone, where autograd does not record the call: a compiled graph does not say what
        it needs.
        """
        # Made here, so that no caller's frame holds them.
        outputs = forward(*args)
        if _thread.needs is None:
            return
        ctx = _Rehearsal(_thread.needs)
        self.save(ctx, args, outputs)
        grads = outputs[: self.num_outputs]
        # As in a real backward, nothing but ctx holds the others.
        del outputs
        _thread.is_rehearsing = True
        try:
            self.backward(ctx, *grads)
        finally:
            _thread.is_rehearsing = False


class _Thread(threading.local):
    # Of the forward that autograd records: which arguments need a gradient.
    needs: Sequence[bool] | None = None
    # Whether a backward is gone through for the sake of its kernels. Its ops then call our own
    # implementations, past the dispatcher. That these compile and do not launch is decided where they
    # launch (_triton/compiling.py).
    is_rehearsing = False


_thread = _Thread()


class _Rehearsal:
    """Stands for autograd's ctx where a backward is gone through for the sake of its kernels."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs = needs
        self.saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def maybe_clear_saved_tensors(self) -> None:
        self.saved_tensors = ()


def function_of(name: str) -> Any:
    """Return what "module:attribute" names, imported when it is asked for."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _device_kernel(op: Op, device_type: str) -> Callable[..., Tensors]:
    """Make the kernel of a device: it checks, then calls the implementation chosen at first."""

    def load() -> codegen.Loaded:
        choice = op.choose(device_type)
        if choice.name != IMPLEMENTATIONS[device_type][0]:
            logger.warning(
                "%s::%s on %s: the %s implementation serves it (%s)",
                NAMESPACE, op.name, device_type, choice.name, choice.reason,
            )  # fmt: skip
        implementation = op._load(choice.name)
        if device_type == "cpu" or choice.name not in REPLAYS:
            return implementation, None
        replays = function_of(REPLAYS[choice.name])(implementation)
        if op._outer_autograd is not None:
            first_call = function_of(FIRST_CALLS[choice.name])
            implementation = first_call(implementation, op._outer_autograd.go_through_backward)
        return implementation, replays

    # If one tensor is on another device, the dispatcher calls that device's kernel, not the CPU's.
    return op.generated.kernel_of(load, device_type != "cpu")


def _autocast_kernel(op: Op, device_type: str) -> Callable[..., Tensors]:
    """Make the Autocast kernel of any op: it casts, then calls the op with autocast off."""
    marked = [i for i, a in enumerate(op.schema.arguments) if a.autocast]
    castable = (torch.bfloat16, torch.float16, torch.float32)

    def kernel(*args: Any) -> Tensors:
        dtype = torch.get_autocast_dtype(device_type)
        given = list(args)
        for i in marked:
            if i < len(args) and args[i] is not None and args[i].dtype in castable:
                given[i] = args[i].to(dtype)
        torch.set_autocast_enabled(device_type, False)
        try:
            return op.overload(*given)
        finally:
            torch.set_autocast_enabled(device_type, True)

    return kernel


def _autograd_kernel(op: Op) -> Callable[..., Tensors]:
    """Make the Autograd kernel of any op.

    It asks the dispatcher for the kernel below autograd, as torch's own custom ops do. So a kernel
    that somebody registered over ours is called.

    register_autograd would do the same, with three faults. It hands over arguments without the
    trailing defaults, which the dispatcher dropped. It gives zero tangents in forward-mode AD
    instead of an error. It costs twice as much per call.
    """
    function, defaults = _autograd_function(op), op.defaults
    is_grad_enabled, redispatch = torch.is_grad_enabled, op.overload.redispatch

    def kernel(keyset: torch.DispatchKeySet, *args: Any) -> Tensors:
        if forward_ad_is_on():
            _refuse_tangents(op, args)
        try:
            if not is_grad_enabled():
                # Nothing below can record a gradient, so the guard, 0.8 us of a call, is left out.
                return redispatch(keyset & AFTER_AUTOGRAD, *args)
            if any_requires_grad(*args):
                # The dispatcher drops trailing arguments that equal their defaults.
                return function.apply(keyset, *args, *defaults[len(args) :])
            with below_autograd():
                return redispatch(keyset & AFTER_AUTOGRAD, *args)
        except (NotImplementedError, RuntimeError) as error:
            _explain_tensors(op, args, error)
            raise

    return kernel


def _autograd_function(op: Op) -> Any:
    """Make the autograd.Function that records a call of the op."""
    num_arguments, num_outputs = len(op.schema.arguments), len(op.schema.outputs)
    without_gradient = [a for a in op.schema.without_gradient if not a.ignores_grad]
    refused = [(op.schema.arguments.index(a), a.name) for a in without_gradient]

    def forward(ctx: Any, keyset: torch.DispatchKeySet, *args: Any) -> Tensors:
        called = op if op._autograd is None else op._autograd.forward
        ctx.needs = _thread.needs = ctx.needs_input_grad[1:]
        try:
            with below_autograd():
                outputs = called.overload.redispatch(keyset & AFTER_AUTOGRAD, *args)
        finally:
            _thread.needs = None
        ctx.set_materialize_grads(False)
        # This comes after the op's own checks: a weight of another dtype gets its own error.
        for index, argument in refused:
            if ctx.needs[index]:
                _refuse_grad(op, argument)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        own = several[:num_outputs]
        ctx.mark_non_differentiable(*(o for o in own if not o.is_floating_point()))
        if op._autograd is not None:
            op._autograd.save(ctx, args, outputs)
        return own if num_outputs > 1 else own[0]

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if op._autograd is None:
            raise NotImplementedError(
                f"{NAMESPACE}::{op.name}: has no gradient of its own: neither a backward through "
                f"this op nor a double backward through the one that calls it is supported"
            )
        if all(grad is None for grad in grads):
            return (None,) * (1 + num_arguments)
        given = op._autograd.backward(ctx, *grads)
        wanted = [g if need else None for g, need in zip(given, ctx.needs, strict=False)]
        return (None, *wanted, *[None] * (num_arguments - len(wanted)))

    name = "".join(word.capitalize() for word in op.name.split("_"))
    return type(
        f"Moe{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


def _refuse_grad(op: Op, argument: str) -> NoReturn:
    raise ValueError(
        f"{NAMESPACE}::{op.schema.called}: expected {argument}.requires_grad == False ({argument} has "
        f"no gradient), got True; call {argument}.requires_grad_(False) or pass {argument}.detach()"
    )


def _explain_tensors(op: Op, args: tuple[Any, ...], error: Exception) -> None:
    """Raise an error that says what to do, where a call failed because of DTensors or sparse ones."""
    for argument, value in zip(op.schema.arguments, args, strict=False):
        if isinstance(value, torch.Tensor):
            check_tensor(f"{NAMESPACE}::{op.schema.called}", argument.name, value)
        if is_sharded(value):
            raise TypeError(
                f"{NAMESPACE}::{op.schema.called}: expected plain tensors, or a sharding rule for "
                f"DTensors, got a DTensor for {argument.name}; spread experts over ranks with "
                f"moe_ops.distributed.ExpertParallel, or pass {argument.name}.to_local()"
            ) from error


def _refuse_tangents(op: Op, args: tuple[Any, ...]) -> None:
    for argument, value in zip(op.schema.arguments, args, strict=False):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{NAMESPACE}::{op.name}: forward-mode AD is not supported, and {argument.name} "
                f"has a tangent"
            )


def is_transposed(weight: torch.Tensor) -> bool:
    """Return whether the matrices of a weight (E, N, D) are transposed views.

    Its gradient is then made in the same order, because autograd would copy any other.
    """
    return weight.stride(1) == 1 and weight.stride(2) != 1


def documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the public function of an op the docstring that its schema makes."""
    function.__doc__ = reference.docstring(SCHEMAS[function.__name__])
    return function
