# SPDX-License-Identifier: Apache-2.0
"""Turns grouped_gemm's three configurations into the op's one string, in eager and compiled code.

A configuration is a class of moe_ops or its subclass in kernels/tuning.py. The string is the same.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import fields
from typing import Any

from moe_ops.configs.kernel_config import (
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config

Values = tuple[Any, ...]
_FIELDS: dict[type[KernelConfig], tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (KernelConfigForward, KernelConfigBackward_dX, KernelConfigBackward_dW)
}


def kernel_string(
    forward: KernelConfigForward | None,
    backward_dX: KernelConfigBackward_dX | None,
    backward_dW: KernelConfigBackward_dW | None,
) -> str | None:
    """Return what moe_ops.kernel_config makes of the three, or None if none is given.

    It makes one string for each set of values. torch.compile takes the string for a constant.

    Raises:
        TypeError: a configuration belongs to another GEMM. The error names grouped_gemm's argument.
    """
    if forward is None and backward_dX is None and backward_dW is None:
        return None
    return _string_of(
        _values("kernel_config_fwd", forward, KernelConfigForward),
        _values("kernel_config_bwd_dX", backward_dX, KernelConfigBackward_dX),
        _values("kernel_config_bwd_dW", backward_dW, KernelConfigBackward_dW),
    )


def _values(name: str, config: KernelConfig | None, kind: type[KernelConfig]) -> Values | None:
    """Return the values of moe_ops' fields in their order, or None for None.

    If an integer changes between two calls, torch.compile takes it for a size. operator.index makes
    it a constant. It would turn a bool into an integer, and the configurations refuse that.
    """
    if config is None:
        return None
    if not isinstance(config, kind):
        expected = f"expected {name} to be a {kind.__name__}"
        got = type(config).__name__
        raise TypeError(f"moe_ops.compat.grouped_gemm: {expected}, got {got}")
    values = [getattr(config, field) for field in _FIELDS[kind]]
    return tuple([v if isinstance(v, bool) else operator.index(v) for v in values])


@functools.lru_cache(maxsize=256)
def _cached_string(
    forward: Values | None, backward_dX: Values | None, backward_dW: Values | None
) -> str:
    return kernel_config(
        None if forward is None else KernelConfigForward(*forward),
        None if backward_dX is None else KernelConfigBackward_dX(*backward_dX),
        None if backward_dW is None else KernelConfigBackward_dW(*backward_dW),
    )


def _string_of(
    forward: Values | None, backward_dX: Values | None, backward_dW: Values | None
) -> str:
    """Call _cached_string. torch.compile calls this while it traces, and takes the result for a constant.

    The arguments are plain values: torch.compile guards on them, and knows them even where the
    configuration is made in the traced code.
    """
    return _cached_string(forward, backward_dX, backward_dW)


# Dynamo cannot trace json. torch.compiler.assume_constant_result sets this attribute too, but it first
# imports torch._dynamo, which takes a second.
_string_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
