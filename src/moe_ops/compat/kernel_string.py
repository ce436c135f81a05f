# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm's three configurations as the op's one string, in eager and under torch.compile."""

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
    """What moe_ops.kernel_config makes of the three, None where none is given.

    It is made once for each set of values, and is a constant for torch.compile.

    Raises:
        TypeError: a configuration is that of another GEMM; the error names grouped_gemm's argument.
    """
    if forward is None and backward_dX is None and backward_dW is None:
        return None
    return _string_of(
        _values("kernel_config_fwd", forward, KernelConfigForward),
        _values("kernel_config_bwd_dX", backward_dX, KernelConfigBackward_dX),
        _values("kernel_config_bwd_dW", backward_dW, KernelConfigBackward_dW),
    )


def _values(name: str, config: KernelConfig | None, kind: type[KernelConfig]) -> Values | None:
    """The values of the fields, in order; None for None.

    torch.compile takes an integer that changes between two calls for a size. operator.index makes
    it a constant. Of a bool it would make an integer, which the configurations refuse.
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
    """_cached_string, which torch.compile calls while it traces and takes for a constant.

    Of plain values, since those it guards on, and knows of a configuration made while tracing.
    """
    return _cached_string(forward, backward_dX, backward_dW)


# Dynamo cannot trace json. This is what torch.compiler.assume_constant_result does, without the
# import of torch._dynamo, which takes a second.
_string_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
