# SPDX-License-Identifier: Apache-2.0
"""The argument `kernel_config` of the ops: one string that holds up to three configurations.

It is a string because torch.compile then takes it for a constant, and an exported program keeps it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import Any

from moe_ops.configs.kernel_config import (
    PASSES,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.strict_json import read_json

# Configurations once had these flags, which no kernel read. Tables, caches and exported programs of
# that time still hold them.
_RETIRED = frozenset({"permute_x", "permute_y", "fuse_mul_post"})


def kernel_config(
    forward: KernelConfigForward | None = None,
    backward_dX: KernelConfigBackward_dX | None = None,
    backward_dW: KernelConfigBackward_dW | None = None,
) -> str:
    """Return the string that an op takes as its argument `kernel_config`.

    A kernel without a configuration gets one by its shape, as without the string.

    Args:
        forward (KernelConfigForward or None): for grouped_gemm.
        backward_dX (KernelConfigBackward_dX or None): for grouped_gemm_dx.
        backward_dW (KernelConfigBackward_dW or None): for grouped_gemm_dw.

    Returns:
        str: a JSON object with an entry for each configuration that is given.

    Raises:
        TypeError: an argument is not the configuration of its pass.
    """
    given = dict(zip(PASSES, (forward, backward_dX, backward_dW), strict=True))
    content = {}
    for name, config in given.items():
        if config is None:
            continue
        if not isinstance(config, PASSES[name]):
            expected, got = PASSES[name].__name__, type(config).__name__
            raise TypeError(f"kernel_config: expected {name} to be a {expected}, got {got}")
        # A subclass may have more fields (those of moe_ops.compat do). The ops know these alone.
        content[name] = {field.name: getattr(config, field.name) for field in fields(PASSES[name])}
    return json.dumps(content)


@functools.lru_cache(maxsize=256)
def why_not_kernel_config(text: str) -> str | None:
    """Return why `parse` refuses the string, or None if it does not."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def parse(text: str) -> dict[str, KernelConfig]:
    """Return the configurations in a `kernel_config` string, by pass.

    Raises:
        ValueError: `kernel_config()` makes no such string. The error says why.
    """
    content = read_json(text)
    if not isinstance(content, dict) or not content.keys() <= PASSES.keys():
        raise ValueError(f"expected a JSON object with keys of {tuple(PASSES)}")
    return {name: read_fields(name, values) for name, values in content.items()}


def read_fields(name: str, values: Any) -> KernelConfig:
    """Return the configuration of a pass (a key of PASSES) from the JSON object of its fields.

    Retired flags are dropped here and nowhere else.

    Raises:
        ValueError: it is no such object. The error says why.
    """
    if not isinstance(values, dict):
        got = json.dumps(values)
        raise ValueError(f"expected {name} to be a JSON object of fields, got {got}")
    living = {
        field: value
        for field, value in values.items()
        if not (field in _RETIRED and isinstance(value, bool))
    }
    try:
        return PASSES[name].from_dict(living)
    except TypeError as error:
        raise ValueError(str(error)) from None
