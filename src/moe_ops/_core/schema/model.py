# SPDX-License-Identifier: Apache-2.0
"""Defines `OpSchema` and its parts, and the words that a YAML may use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .expressions import Expr

# Every dtype group that a YAML may name. `FLOAT64_DEVICES` narrows `floating` per device.
DTYPES: Mapping[str, tuple[str, ...]] = {
    "floating": ("bfloat16", "float16", "float32", "float64"),
    "index": ("int32", "int64"),
    "float32": ("float32",),
    "int32": ("int32",),
    "float8_e4m3fn": ("float8_e4m3fn",),
    "uint8": ("uint8",),
}
FLOAT64_DEVICES = ("cpu", "meta")
# The dtypes in which quantised weights come. `advice` may be for one of them or for all.
QUANTISED = (
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2", "int8",
    "uint8",
)  # fmt: skip

# What the elements of a tensor stand for; the tests draw them by this word.
VALUES = re.compile(
    r"permutation|inverse of (?P<inverse>\w+)|counts of (?P<counts>\w+)"
    r"|(?:distinct )?ids below (?P<ids>\w+)"
    r"|weights in (?P<format>\w+)|scales in (?P<scales>\w+)|nested scales|sent slots|local ids"
)
# What a string argument may have to be; codegen.py asks the question that belongs to each.
FORMATS = ("kernel_config",)
ACCUMULATOR = re.compile(r"accumulator\((\w+)\)")
# A list of so many flags.
FLAGS = re.compile(r"bool\[([1-9]\d*)\]")
# A word of an expression, or a string as a whole, whose words stay as they are.
_WORD = re.compile(r"'[^']*'|\w+")
# Stands for the default of an argument that has none.
REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    default: Any
    doc: str
    shape: tuple[Expr, ...] = ()
    dtype: str = ""
    values: str = ""
    # What a caller of the Python function passes, of which this tensor is the stored form.
    stands_for: str = ""
    grad: bool = False
    # It has no gradient, and may require one all the same.
    ignores_grad: bool = False
    autocast: bool = False
    minimum: Expr | None = None
    maximum: Expr | None = None
    choices: tuple[Any, ...] = ()
    format: str = ""
    # What to do about an error: by the given dtype, for any wrong "dtype", or for "any" error.
    advice: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def called(self) -> str:
        """Return what errors call the argument as a whole."""
        return self.stands_for or self.name

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

    @property
    def is_index(self) -> bool:
        return self.dtype == "index"

    @property
    def is_optional(self) -> bool:
        return self.type.endswith("?")

    @property
    def num_flags(self) -> int:
        """Return N of a bool[N], or 0 of any other type."""
        match = FLAGS.fullmatch(self.type)
        return int(match[1]) if match else 0

    @property
    def has_default(self) -> bool:
        return self.default is not REQUIRED


@dataclass(frozen=True)
class Output:
    name: str
    shape: tuple[Expr, ...]
    dtype: str
    doc: str
    condition: Expr | None = None
    column_major: Expr | None = None


@dataclass(frozen=True)
class Where:
    expect: Expr
    because: str


@dataclass(frozen=True)
class Size:
    """One axis of a tensor argument: it binds `letter`, or it must equal `expr`."""

    argument: Argument
    axis: int
    expr: Expr
    letter: str = ""

    @property
    def called(self) -> str:
        """Return the axis as errors name it. The last axis of a stored form is its own: bytes."""
        is_last = self.axis == len(self.argument.shape) - 1
        name = self.argument.name if is_last else self.argument.called
        return f"{name}.shape[{self.axis}]"


@dataclass(frozen=True)
class OpSchema:
    name: str
    file: str
    since: str
    summary: str
    schema: str
    dims: Mapping[str, str]
    let: Mapping[str, Expr]
    arguments: tuple[Argument, ...]
    outputs: tuple[Output, ...]
    where: tuple[Where, ...] = ()
    equation: str = ""
    notes: str = ""
    source: str = ""
    runs_for: str = ""
    backward: tuple[str, ...] = ()
    flops: Expr | None = None
    sizes: tuple[Size, ...] = field(default=(), repr=False)

    @property
    def called(self) -> str:
        """Return the op that the caller called, which errors name."""
        return self.runs_for or self.name

    @property
    def tensors(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.is_tensor)

    @property
    def scalars(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if not a.is_tensor)

    def argument(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    @property
    def without_gradient(self) -> tuple[Argument, ...]:
        """Return the floating arguments that get no gradient where others of the op get one."""
        if not any(a.grad for a in self.tensors):
            return ()
        return tuple(a for a in self.tensors if not a.grad and self._is_floating(a))

    def _is_floating(self, argument: Argument) -> bool:
        if argument.dtype not in DTYPES:
            return self._is_floating(self.argument(argument.dtype))
        return argument.dtype not in ("index", "int32", "uint8")

    def spell(self, expr: Expr) -> str:
        """Return `expr` with its letters replaced by the names of the dimensions."""
        return _WORD.sub(lambda word: self.dims.get(word[0], word[0]), expr.source)
