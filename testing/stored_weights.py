# SPDX-License-Identifier: Apache-2.0
"""Draws the bytes of quantised weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def finite_bytes(
    kind: re.Match[str],
    arguments: Mapping[str, Any],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """Return bytes whose numbers are finite, and not far from 1 in all.

    Args:
        kind: the match of an argument's `values` in its schema.
        arguments: the op's, by name. `kind` names the one that says how to read the bytes.
        shape: of the bytes.
        generator: draws them.
    """
    encoding = arguments.get(kind["scales"], "float32")
    if kind["format"] or encoding in ("nested", "e8m0"):
        low, high = (124, 127) if encoding == "e8m0" else (0, 256)
        codes = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
        # FP8 codes from 0.5 to 1.875, of either sign.
        return codes & 143 | 48 if arguments.get(kind["format"]) == "fp8_block" else codes
    dtype = getattr(torch, encoding)
    count = (*shape[:-1], shape[-1] // dtype.itemsize)
    return (torch.rand(count, generator=generator) * 0.2 + 0.1).to(dtype).view(torch.uint8)
