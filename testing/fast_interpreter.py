# SPDX-License-Identifier: Apache-2.0
"""Replaces the three slowest steps of Triton's interpreter by quick ones that give the same.

tl.sort reduces by xor, which the interpreter does element by element in Python. It looks up NumPy's
dtype in a dict that it builds anew each time. And at each call of a device function it walks over
all members of triton.language to find the ones to replace. Together that was most of the time of
tests/interpreter. test_fast_interpreter.py holds the quick steps against Triton's own.

These are Triton's internals. A Triton without one of them keeps its own step.
"""

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Triton's own steps, by name, of those that were replaced.
ORIGINAL: dict[str, Any] = {}


def install() -> None:
    """Replace the slow steps; call it before the first launch. A second call does nothing."""
    if ORIGINAL:
        return
    for owner, name, quick in (
        (interpreter.ReduceOps, "generic_reduce", generic_reduce),
        (interpreter, "_get_np_dtype", get_np_dtype),
        (interpreter, "_patch_builtin", patch_builtin),
    ):
        if hasattr(owner, name):
            ORIGINAL[name] = getattr(owner, name)
            setattr(owner, name, quick)


def generic_reduce(self: Any, input: tuple[Any, ...]) -> Any:
    """Reduce by xor along an axis in NumPy, and by everything else as Triton does."""
    if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
        return ORIGINAL["generic_reduce"](self, input)
    (x,) = input
    reduced = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return [self.to_tensor(reduced, x.dtype)]


_NP_DTYPES: dict[str, Any] = {}


def get_np_dtype(dtype: Any) -> Any:
    """Return NumPy's dtype for one of Triton's, remembered by its name."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if isinstance(element, tl.pointer_type):
        return ORIGINAL["_get_np_dtype"](element)
    if element.name not in _NP_DTYPES:
        _NP_DTYPES[element.name] = ORIGINAL["_get_np_dtype"](element)
    return _NP_DTYPES[element.name]


_BUILTINS: dict[Any, list[str]] = {}


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Replace the builtins of a package or class, whose names are found once."""
    if package not in _BUILTINS:
        _BUILTINS[package] = builtins_of(package)
    for name in _BUILTINS[package]:
        member = getattr(package, name)
        # Not those that are replaced already.
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def builtins_of(package: Any) -> list[str]:
    """Return the names of a package's builtins, as Triton finds them while none is replaced."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
