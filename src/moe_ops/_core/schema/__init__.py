# SPDX-License-Identifier: Apache-2.0
"""Reads op_schemas/*.yaml into `OpSchema` objects and rejects what is malformed.

It needs PyYAML and neither torch nor the rest of the package: setup.py loads this folder by its
path and validates the schemas when the package is built. So its imports are relative.

What is made from an `OpSchema` is in codegen.py (checks, fake kernel, FLOP formula), reference.py
(docstrings, docs/ops) and testing/strategies.py. docs/schemas.md explains the format.
"""

from .errors import SchemaError
from .expressions import Expr, solve
from .model import (
    ACCUMULATOR,
    DTYPES,
    FLOAT64_DEVICES,
    QUANTISED,
    REQUIRED,
    VALUES,
    Argument,
    OpSchema,
    Output,
    Size,
    Where,
)
from .reader import load, load_all

__all__ = [
    "ACCUMULATOR",
    "DTYPES",
    "FLOAT64_DEVICES",
    "QUANTISED",
    "REQUIRED",
    "VALUES",
    "Argument",
    "Expr",
    "OpSchema",
    "Output",
    "SchemaError",
    "Size",
    "Where",
    "load",
    "load_all",
    "solve",
]
