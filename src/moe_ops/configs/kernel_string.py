# SPDX-License-Identifier: Apache-2.0
"""The ops' string argument `kernel_config`: making it from the configurations, and reading it.

torch.compile takes a string for a constant, and an exported program keeps it.
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

# Flags that configurations once had and that no kernel read. Tables, caches and exported programs
# made at that time still hold them.
_RETIRED = frozenset({"permute_x", "permute_y", "fuse_mul_post"})


def kernel_config(
    forward: KernelConfigForward | None = None,
    backward_dX: KernelConfigBackward_dX | None = None,
    backward_dW: KernelConfigBackward_dW | None = None,
) -> str:
    """The `kernel_config` argument of the grouped_gemm ops.

    Args:
        forward (KernelConfigForward or None): for grouped_gemm; None: chosen by shape.
        backward_dX (KernelConfigBackward_dX or None): for grouped_gemm_dx.
        backward_dW (KernelConfigBackward_dW or None): for grouped_gemm_dw.

    Returns:
        str: JSON, an object with an entry for each configuration that is given.

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
        # A subclass may have more fields, as moe_ops.compat's have; the ops know these.
        content[name] = {field.name: getattr(config, field.name) for field in fields(PASSES[name])}
    return json.dumps(content)


@functools.lru_cache(maxsize=256)
def why_not_kernel_config(text: str) -> str | None:
    """Why `parse` refuses the string; None where it does not."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def parse(text: str) -> dict[str, KernelConfig]:
    """The configurations in a `kernel_config` string, by pass.

    Raises:
        ValueError: it is not what `kernel_config()` makes, with the reason.
    """
    content = read_json(text)
    if not isinstance(content, dict) or not content.keys() <= PASSES.keys():
        raise ValueError(f"expected a JSON object with keys of {tuple(PASSES)}")
    return {name: read_fields(name, values) for name, values in content.items()}


def read_fields(name: str, values: Any) -> KernelConfig:
    """The configuration of one pass, a key of PASSES, from the JSON object of its fields.

    Retired flags are dropped, here and nowhere else.

    Raises:
        ValueError: it is no such object, with the reason.
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
