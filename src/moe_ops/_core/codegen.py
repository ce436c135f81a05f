# SPDX-License-Identifier: Apache-2.0
"""Turns an `OpSchema` into straight-line functions: checked kernel, fake kernel, FLOP formula.

The functions are source text. The kernel is compiled at import, the others when they are called first.
A call costs one to two microseconds, several times less than walking the schema would.
`python -m moe_ops show OP` prints them.

All three bind the dimension letters with the same lines, from the shapes of the arguments. The
kernel's checks raise at once. The fake kernel's ask through torch._check_with, which also works for
sizes that a compiler knows by name alone.
"""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Callable
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import torch

from moe_ops._core.checks import dtype_name
from moe_ops._core.schema import (
    ACCUMULATOR,
    DTYPES,
    FLOAT64_DEVICES,
    Argument,
    Expr,
    OpSchema,
    Output,
    Size,
    solve,
)
from moe_ops._core.torch_private import check_with
from moe_ops.configs.kernel_string import why_not_kernel_config

_GLOBALS: dict[str, Any] = {
    "_check_with": check_with,
    # One for each format of a string argument: returns why a string is not in it, or None.
    "_why_not_kernel_config": why_not_kernel_config,
    "_dtype_name": dtype_name,
    **{f"_group_{g}": frozenset(getattr(torch, d) for d in names) for g, names in DTYPES.items()},
    **{f"_{name}": getattr(torch, name) for name in (*DTYPES["floating"], "int32")},
}


class Replays(Protocol):
    """The records of calls of an implementation, by what a call depends on beside tensors' values.

    records[key](*addresses) does a call again: it gets the address of each tensor argument, or 0 in
    place of None, and returns None if it cannot. A recorded call has passed the checks.
    """

    records: dict[Any, Callable[..., Any]]

    def call(self, key: Any, tensors: tuple[torch.Tensor | None, ...], *args: Any) -> Any:
        """Call the implementation, and perhaps record the call; the tensors are among args."""


Loaded = tuple[Callable[..., Any], Replays | None]


class Functions:
    """The functions that are generated for one op. The kernel is compiled at once, the others when called.

    kernel_of(load, may_mix) makes a kernel. It checks its arguments, then calls the implementation
    with all of them, defaults too. load() returns the implementation, and its Replays or None; it
    is called once, after the first call whose checks pass. `may_mix` says whether the dispatcher
    may hand the kernel tensors of several devices.
    """

    def __init__(self, schema: OpSchema) -> None:
        self._schema = schema
        self._kernel_source = "\n\n".join([*_advice_tables(schema), _kernel_of(schema)])
        names = _compiled(self._kernel_source, f"<moe_ops {schema.file}>")
        self.kernel_of: Callable[[Callable[[], Loaded], bool], Callable[..., Any]] = names[
            "kernel_of"
        ]
        self.flops = None if schema.flops is None else self._flops

    def fake(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return empty outputs, for arguments that a compiler may know by name alone."""
        outputs: torch.Tensor | tuple[torch.Tensor, ...] = self._others["fake"](*args, **kwargs)
        return outputs

    def _flops(self, *args: Any, **kwargs: Any) -> int:
        number: int = self._others["flops"](*args, **kwargs)
        return number

    @cached_property
    def source(self) -> str:
        """The text of all functions."""
        return f"{self._kernel_source}\n\n{self._others_source}"

    @cached_property
    def _others_source(self) -> str:
        schema = self._schema
        body = _Body(schema, symbolic=True).checks() + _outputs(schema)
        parts = [_function("fake", schema, body)]
        if schema.flops is not None:
            body = [*_Body(schema, symbolic=False).bindings(), f"return {schema.flops.source}"]
            parts.append(_function("flops", schema, body, extra=", out_val=None"))
        return "\n\n".join(parts)

    @cached_property
    def _others(self) -> dict[str, Any]:
        tables = "\n\n".join(_advice_tables(self._schema))
        source = f"{tables}\n\n{self._others_source}" if tables else self._others_source
        return _compiled(source, f"<moe_ops {self._schema.file}, fake>")


def generate(schema: OpSchema) -> Functions:
    """Make the kernel, the fake kernel and, where the schema has `flops`, the FLOP formula."""
    return Functions(schema)


def _compiled(source: str, filename: str) -> dict[str, Any]:
    """Return the names that a text of functions defines."""
    # Tracebacks show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(_GLOBALS)
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def _advice_tables(schema: OpSchema) -> list[str]:
    """Return the tables in which the functions look up what to do about a wrong dtype."""
    return [
        f"_advice_{argument.name} = {_by_dtype(argument)!r}\n"
        for argument in schema.tensors
        if _by_dtype(argument)
    ]


def _by_dtype(argument: Argument) -> dict[str, str]:
    return {
        f"torch.{dtype}": f"; {text}"
        for dtype, text in argument.advice.items()
        if dtype not in ("any", "dtype", argument.dtype)
    }


def _kernel_of(schema: OpSchema) -> str:
    names = ", ".join(a.name for a in schema.arguments)
    tensors = ", ".join(a.name for a in schema.tensors)
    body = [
        "nonlocal _implementation, _replays",
        "_key = None",
        *_replay(schema),
        *_Body(schema, symbolic=False).checks(),
        "if _implementation is None:",
        "    _implementation, _replays = _load()",
        "elif _key is not None:",
        f"    return _replays.call(_key, ({tensors},), {names})",
        f"return _implementation({names})",
    ]
    kernel = textwrap.indent(_function("kernel", schema, body), "    ")
    return (
        "def kernel_of(_load, _may_mix):\n"
        f"    _implementation = _replays = None\n\n{kernel}\n"
        "    return kernel\n"
    )


def _replay(schema: OpSchema) -> list[str]:
    """Return the lines that look for a record of the call, and do it again if there is one."""
    parts = []
    for argument in schema.arguments:
        name = argument.name
        if not argument.is_tensor:
            parts.append(f"(*{name},)" if argument.num_flags else name)
            continue
        # Triton and TMA ask whether an address is a multiple of 16.
        facts = ("shape", "stride()", "dtype", "get_device()")
        parts.append(
            f"None if {name} is None else "
            f"({', '.join(f'{name}.{fact}' for fact in facts)}, _{name}_at % 16)"
        )
    lines = [
        *(f"_{t.name}_at = 0 if {t.name} is None else {t.name}.data_ptr()" for t in schema.tensors),
        "_key = (",
        *(f"    {part}," for part in parts),
        ")",
        "_record = _replays.records.get(_key)",
        "if _record is not None:",
        f"    _outputs = _record({', '.join(f'_{t.name}_at' for t in schema.tensors)})",
        "    if _outputs is not None:",
        "        return _outputs",
    ]
    return ["if _replays is not None:", *(f"    {line}" for line in lines)]


def _function(name: str, schema: OpSchema, body: list[str], extra: str = "") -> str:
    parameters = ", ".join(
        f"{a.name}={a.default!r}" if a.has_default else a.name for a in schema.arguments
    )
    lines = "\n".join(f"    {line}" for line in body)
    return f"def {name}({parameters}{extra}):\n{lines}\n"


class _Body:
    """Writes the lines that bind the letters and check the arguments of one op."""

    def __init__(self, schema: OpSchema, *, symbolic: bool) -> None:
        self.schema = schema
        self.symbolic = symbolic
        self.first = schema.arguments[0]
        # Errors name the axis that bound a letter: it stands for the whole expression of its size.
        self.axis_of = {s.expr.source: s.called for s in schema.sizes if s.letter}

    def checks(self) -> list[str]:
        lines: list[str] = []
        late = [a for a in self.schema.scalars if self.mentions_dims(a)]
        for argument in self.schema.scalars:
            if argument not in late:
                lines += self.scalar(argument)
        for argument in self.schema.tensors:
            lines += self.guarded(argument, self.tensor(argument))
        for argument, sizes in groupby(self.schema.sizes, key=lambda size: size.argument):
            lines += self.guarded(argument, [line for size in sizes for line in self.size(size)])
        for argument in late:
            lines += self.scalar(argument)
        for where in self.schema.where:
            lines += self.where(where.expect, where.because)
        return lines

    def bindings(self) -> list[str]:
        sizes = [size for size in self.schema.sizes if size.letter]
        return [line for size in sizes for line in self.bind(size, "{}.shape")]

    def mentions_dims(self, argument: Argument) -> bool:
        bounds = filter(None, (argument.minimum, argument.maximum))
        return any(bound.names & set(self.schema.dims) for bound in bounds)

    def guarded(self, argument: Argument, lines: list[str]) -> list[str]:
        if not argument.is_optional or not lines:
            return lines
        return [f"if {argument.name} is not None:", *(f"    {line}" for line in lines)]

    def message(self, expected: str, got: str, advice: str = "") -> str:
        """Return the source of an f-string. What stands in braces in the parts is evaluated there."""
        return f'f"moe::{self.schema.called}: expected {expected}, got {got}{advice}"'

    def advice(self, argument: Argument, *, of_dtype: bool = False) -> str:
        """Return the advice with which an error about the argument ends."""
        text = argument.advice.get("any")
        if of_dtype:
            text = argument.advice.get("dtype", text)
        anyway = "" if text is None else f"; {_literal(text)}"
        if of_dtype and _by_dtype(argument):
            return f"{{_advice_{argument.name}.get(str({argument.name}.dtype), {anyway!r})}}"
        return anyway

    def require(self, condition: str, expected: str, got: str, advice: str = "") -> list[str]:
        """Return the lines that check sizes or scalars, which a compiler may know by name alone."""
        message = self.message(expected, got, advice)
        if self.symbolic:
            return [f"_check_with(ValueError, {condition}, lambda: {message})"]
        return [f"if not ({condition}):", f"    raise ValueError({message})"]

    def tensor(self, argument: Argument) -> list[str]:
        name = argument.name
        lines = []
        if not argument.is_optional:
            # The dispatcher accepts None for a tensor if another argument is a tensor.
            message = self.message(f"{name} to be a tensor", "None")
            lines += [f"if {name} is None:", f"    raise TypeError({message})"]
        lines += self.dtype(argument)
        if argument is not self.first:
            message = self.message(
                f"{argument.called}.device == {self.first.name}.device ({{{self.first.name}.device}})",
                f"{{{name}.device}}",
            )
            asked = "" if self.symbolic else "_may_mix and "
            lines += [
                f"if {asked}{name}.device != {self.first.name}.device:",
                f"    raise ValueError({message})",
            ]
        # Read once: each `tensor.shape` is a new object.
        lines.append(f"_{name}_shape = {name}.shape")
        letters = ", ".join(self.schema.spell(e) for e in argument.shape)
        message = self.message(
            f"{name}.dim() == {len(argument.shape)} ({letters})",
            f"{{{name}.dim()}} {{tuple({name}.shape)}}",
            self.advice(argument),
        )
        return [
            *lines,
            f"if len(_{name}_shape) != {len(argument.shape)}:",
            f"    raise ValueError({message})",
        ]

    def dtype(self, argument: Argument) -> list[str]:
        name, group = argument.name, argument.dtype
        advice = self.advice(argument, of_dtype=True)
        if group not in DTYPES:
            message = self.message(
                f"{name}.dtype == {group}.dtype ({{_dtype_name({group}.dtype)}})",
                f"{{_dtype_name({name}.dtype)}}",
                advice,
            )
            return [f"if {name}.dtype != {group}.dtype:", f"    raise TypeError({message})"]
        got = f"{{_dtype_name({name}.dtype)}}"
        message = self.message(f"{name}.dtype in ({', '.join(DTYPES[group])})", got, advice)
        lines = [f"if {name}.dtype not in _group_{group}:", f"    raise TypeError({message})"]
        if group == "floating":
            narrower = ", ".join(d for d in DTYPES[group] if d != "float64")
            message = self.message(
                f"{name}.dtype in ({narrower}) on {{{name}.device.type}}", "float64"
            )
            lines += [
                f"if {name}.dtype is _float64 and {name}.device.type not in {FLOAT64_DEVICES}:",
                f"    raise TypeError({message})",
            ]
        return lines

    def size(self, size: Size) -> list[str]:
        return self.bind(size) if size.letter else self.equal(size)

    def bind(self, size: Size, shape: str = "_{}_shape") -> list[str]:
        axis = f"{shape.format(size.argument.name)}[{size.axis}]"
        value = solve(size.expr.node, size.letter, axis)
        lines = [f"{size.letter} = {value}"]
        if value != axis:
            factors = _factors(size.expr.node, size.letter)
            lines += self.require(
                f"{axis} == {_operand(size.expr)}",
                f"{size.called} to be a multiple of {factors}{_value(factors)}",
                f"{{{axis}}}",
                self.advice(size.argument),
            )
        return lines

    def equal(self, size: Size) -> list[str]:
        axis = f"_{size.argument.name}_shape[{size.axis}]"
        return self.require(
            f"{axis} == {_operand(size.expr)}",
            f"{size.called} == {self.spell(size.expr)} ({{{size.expr.source}}})",
            f"{{{axis}}}",
            self.advice(size.argument),
        )

    def spell(self, expr: Expr) -> str:
        return self.axis_of.get(expr.source) or self.schema.spell(expr)

    def scalar(self, argument: Argument) -> list[str]:
        name = argument.name
        lines = []
        for bound, sign in ((argument.minimum, ">="), (argument.maximum, "<=")):
            if bound is None:
                continue
            lines += self.require(
                f"{name} {sign} {bound.source}",
                f"{name} {sign} {self.spell(bound)}{_value(bound.source)}",
                f"{{{name}}}",
            )
        if argument.num_flags:
            # The dispatcher takes a list of any length.
            message = self.message(f"len({name}) == {argument.num_flags}", f"{{len({name})}}")
            lines += [
                f"if len({name}) != {argument.num_flags}:",
                f"    raise ValueError({message})",
            ]
        if argument.type == "ScalarType":
            dtypes = ", ".join(argument.choices)
            message = self.message(f"{name} in ({dtypes})", f"{{_dtype_name({name})}}")
            known = ", ".join(f"_{dtype}" for dtype in argument.choices)
            lines += [f"if {name} not in ({known},):", f"    raise TypeError({message})"]
        elif argument.choices:
            allowed = (None, *argument.choices) if argument.is_optional else argument.choices
            message = self.message(f"{name} in {allowed}", f"{{{name}!r}}")
            lines += [f"if {name} not in {allowed}:", f"    raise ValueError({message})"]
        if argument.format:
            made_by = f"the string that moe_ops.{argument.format}() makes"
            message = self.message(f"{name} to be {made_by}", f"{{{name}!r}} ({{_why}})")
            lines += [
                f"if {name} is not None and (_why := _why_not_{argument.format}({name})):",
                f"    raise ValueError({message})",
            ]
        return lines

    def where(self, expect: Expr, because: str) -> list[str]:
        shown = [self._shown(a) for a in self.schema.arguments if a.name in expect.names]
        shown += [f"{name}={{{d}}}" for d, name in self.schema.dims.items() if d in expect.names]
        expected = f"{self.spell(expect)} ({_literal(because)})"
        return self.require(expect.source, expected, ", ".join(shown))

    def _shown(self, argument: Argument) -> str:
        value = f"'None' if {argument.name} is None else 'a tensor'"
        return f"{argument.name}={{{value if argument.is_tensor else argument.name}}}"


def _literal(text: str) -> str:
    """Return `text` so that an f-string in double quotes shows it as it stands."""
    return text.replace("{", "{{").replace("}", "}}").replace('"', "'")


def _value(source: str) -> str:
    """Return what an error shows behind `source`: its value, unless `source` is a number."""
    return "" if source.isdecimal() else f" ({{{source}}})"


def _operand(expr: Expr) -> str:
    """Return the source of `expr` as one side of a comparison."""
    return f"({expr.source})" if isinstance(expr.node, ast.IfExp) else expr.source


def _factors(node: ast.expr, letter: str) -> str:
    """Return the source of the factor of `letter` in `node`; 1 in a branch where it stands alone."""
    if isinstance(node, ast.IfExp):
        body, orelse = _factors(node.body, letter), _factors(node.orelse, letter)
        if "1" in (body, orelse):
            return body if orelse == "1" else orelse
        return f"({body} if {ast.unparse(node.test)} else {orelse})"
    if isinstance(node, ast.BinOp):
        sides = [ast.unparse(side) for side in (node.left, node.right)]
        return sides[1] if sides[0] == letter else sides[0]
    return "1"


def _dtype_source(schema: OpSchema, dtype: str) -> str:
    """Return the source of a dtype: fixed, an argument, or an argument's or its accumulator's."""
    if accumulator := ACCUMULATOR.fullmatch(dtype):
        return f"(_float64 if {accumulator[1]}.dtype is _float64 else _float32)"
    if dtype in DTYPES:
        return f"_{dtype}"
    return f"{dtype}.dtype" if schema.argument(dtype).is_tensor else dtype


def _outputs(schema: OpSchema) -> list[str]:
    lines = []
    for output in schema.outputs:
        lines += _output(schema, output)
    names = ", ".join(f"_{output.name}" for output in schema.outputs)
    return [*lines, f"return {names}" if len(schema.outputs) == 1 else f"return ({names})"]


def _output(schema: OpSchema, output: Output) -> list[str]:
    first = schema.arguments[0].name
    sizes = [expr.source for expr in output.shape]
    dtype = f", dtype={_dtype_source(schema, output.dtype)}" if output.dtype != first else ""
    full = f"{first}.new_empty(({', '.join(sizes)},){dtype})"
    if output.column_major is not None:
        swapped = ", ".join([*sizes[:-2], sizes[-1], sizes[-2]])
        stored = f"{first}.new_empty(({swapped},){dtype}).transpose(-2, -1)"
        full = f"({stored} if {output.column_major.source} else {full})"
    if output.condition is not None:
        full = f"{full} if {output.condition.source} else {first}.new_empty((0,))"
    return [f"_{output.name} = {full}"]
