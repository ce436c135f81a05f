# SPDX-License-Identifier: Apache-2.0
"""Reads op_schemas/*.yaml into `OpSchema` objects and rejects what is malformed.

Pure Python and PyYAML, nothing of torch: setup.py loads this file by its path to validate the
schemas when the package is built. What is made from an `OpSchema` is in codegen.py (checks, fake
kernel, FLOP formula), reference.py (docstrings, docs/ops) and testing/strategies.py.

The format is explained in docs/schemas.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import yaml

# Every dtype group that a YAML may name. `FLOAT64_DEVICES` narrows `floating` per device.
DTYPES: Mapping[str, tuple[str, ...]] = {
    "floating": ("bfloat16", "float16", "float32", "float64"),
    "index": ("int32", "int64"),
    "float32": ("float32",),
    "int32": ("int32",),
    "float8_e4m3fn": ("float8_e4m3fn",),
}
FLOAT64_DEVICES = ("cpu", "meta")
# What quantised weights come in; `advice` may be for one of them, for all, or for any error.
QUANTISED = (
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2", "int8",
    "uint8",
)  # fmt: skip

# What the elements of a tensor stand for; the tests draw them by this word.
VALUES = re.compile(
    r"permutation|inverse of (?P<inverse>\w+)|counts of (?P<counts>\w+)"
    r"|(?:distinct )?ids below (?P<ids>\w+)"
)
# What a string argument may have to be; codegen.py has the question that belongs to each.
FORMATS = ("kernel_config",)
ACCUMULATOR = re.compile(r"accumulator\((\w+)\)")
REQUIRED = object()

_TYPES = ("Tensor", "Tensor?", "SymInt", "bool", "float", "float?", "str", "str?")
# A list of so many flags.
_FLAGS = re.compile(r"bool\[([1-9]\d*)\]")
# What a default may be, by type without its question mark.
_DEFAULTS: Mapping[str, tuple[type, ...]] = {
    "Tensor": (), "SymInt": (int,), "bool": (bool,), "float": (float,), "str": (str,),
}  # fmt: skip
_NODES = (
    ast.Expression, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Name, ast.Load,
    ast.Constant, ast.Subscript, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.And,
    ast.Or, ast.Not, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot,
)  # fmt: skip


class SchemaError(ValueError):
    """A malformed op schema; the text names the file, the key and the reason."""


@dataclass(frozen=True)
class Expr:
    """An expression over dimension letters and scalar arguments.

    `text` is what the YAML says; `node` is its syntax tree with every `let` letter expanded.
    """

    text: str
    node: ast.expr

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(n.id for n in ast.walk(self.node) if isinstance(n, ast.Name))

    @cached_property
    def source(self) -> str:
        return ast.unparse(self.node)

    @cached_property
    def _code(self) -> CodeType:
        return compile(self.source, f"<{self.text}>", "eval")

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        return eval(self._code, {"__builtins__": {}}, dict(values))


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    default: Any
    doc: str
    shape: tuple[Expr, ...] = ()
    dtype: str = ""
    values: str = ""
    grad: bool = False
    autocast: bool = False
    minimum: Expr | None = None
    maximum: Expr | None = None
    choices: tuple[str, ...] = ()
    format: str = ""
    # What to do about an error, by the dtype that was given, or for any "dtype", or any error, "any".
    advice: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

    @property
    def is_optional(self) -> bool:
        return self.type.endswith("?")

    @property
    def num_flags(self) -> int:
        """N of a bool[N]; 0 of any other type."""
        match = _FLAGS.fullmatch(self.type)
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
    """What one axis of a tensor argument says: it binds `letter`, or must equal `expr`."""

    argument: Argument
    axis: int
    expr: Expr
    letter: str = ""


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
    backward: tuple[str, ...] = ()
    flops: Expr | None = None
    sizes: tuple[Size, ...] = field(default=(), repr=False)

    @property
    def tensors(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.is_tensor)

    @property
    def scalars(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if not a.is_tensor)

    def argument(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    def spell(self, expr: Expr) -> str:
        """`expr` with its letters replaced by the names of the dimensions."""
        return ast.unparse(_Substitute(self._dim_nodes).visit(_copy(expr.node)))

    @cached_property
    def _dim_nodes(self) -> dict[str, ast.expr]:
        return {letter: ast.Name(name, ast.Load()) for letter, name in self.dims.items()}


def load_all(directory: Path | Any) -> dict[str, OpSchema]:
    """Reads every *.yaml of a directory (a Path, or a Traversable of importlib.resources)."""
    schemas: dict[str, OpSchema] = {}
    for file in sorted(directory.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            schema = load(file.read_text(encoding="utf-8"), file.name)
            schemas[schema.name] = schema
    for schema in schemas.values():
        for name in schema.backward:
            if name not in schemas:
                _fail(schema.file, "backward", f"there is no op named {name!r}")
    return schemas


def load(text: str, file: str) -> OpSchema:
    """Reads one schema from YAML text; `file` is named in errors."""
    return _Reader(text, file).read()


def solve(node: ast.expr, letter: str, size: str) -> str | None:
    """Source of the value of `letter` for which `node` equals `size`; None if there is no rule.

    The rules: a letter is the size itself; `letter * factor` divides; a conditional expression
    solves both of its branches.
    """
    if isinstance(node, ast.Name) and node.id == letter:
        return size
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side, factor in ((node.left, node.right), (node.right, node.left)):
            if isinstance(side, ast.Name) and side.id == letter and not _mentions(factor, letter):
                return f"{size} // ({ast.unparse(factor)})"
    if isinstance(node, ast.IfExp) and not _mentions(node.test, letter):
        branches = solve(node.body, letter, size), solve(node.orelse, letter, size)
        if None not in branches:
            return f"({branches[0]} if {ast.unparse(node.test)} else {branches[1]})"
    return None


class _Substitute(ast.NodeTransformer):
    def __init__(self, nodes: Mapping[str, ast.expr]) -> None:
        self.nodes = nodes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.nodes.get(node.id, node)


def _copy(node: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(node), mode="eval").body


def _mentions(node: ast.expr, letter: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == letter for n in ast.walk(node))


def _fail(file: str, key: str, reason: str) -> NoReturn:
    raise SchemaError(f"{file}: {key}: {reason}")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C loader where PyYAML has it (10x faster), refusing keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice")
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


class _Reader:
    """Reads one file; every method fails with the file, the key and the reason."""

    KEYS = {
        "op", "since", "summary", "equation", "schema", "dims", "let", "arguments", "where",
        "outputs", "backward", "flops", "notes", "source",
    }  # fmt: skip
    TENSOR_KEYS = {"shape", "dtype", "values", "grad", "autocast", "advice", "doc"}
    SCALAR_KEYS = {"min", "max", "choices", "format", "doc"}
    OUTPUT_KEYS = {"shape", "dtype", "if", "column_major", "doc"}

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        try:
            document = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            self.fail("(whole file)", f"not valid YAML: {error}")
        self.document = self.mapping("(whole file)", document, self.KEYS)
        self.dims: dict[str, str] = {}
        self.let: dict[str, Expr] = {}
        self.types: dict[str, str] = {}

    def fail(self, key: str, reason: str) -> NoReturn:
        _fail(self.file, key, reason)

    def mapping(self, key: str, value: Any, known: Iterable[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            self.fail(key, f"expected a mapping with names as keys, got {value!r}")
        if known is not None and (unknown := set(value) - set(known)):
            self.fail(f"{key}.{min(unknown)}", f"unknown key; known are {', '.join(sorted(known))}")
        return value

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(key, f"expected text, got {value!r}")
        return " ".join(value.split())

    def required(self, key: str) -> Any:
        if key not in self.document:
            self.fail(key, "the key is missing")
        return self.document[key]

    def optional_text(self, key: str) -> str:
        return self.text(key, self.document[key]) if key in self.document else ""

    def read(self) -> OpSchema:
        name = self.text("op", self.required("op"))
        if f"{name}.yaml" != self.file:
            self.fail("op", f"the file of op {name!r} must be named {name}.yaml")
        signature = self.text("schema", self.required("schema"))
        parsed, returns = self.signature(signature)
        self.types = {argument: kind for argument, kind, _ in parsed}
        self.read_dims()
        arguments = tuple(self.read_arguments(parsed))
        if not arguments or arguments[0].type != "Tensor":
            self.fail("schema", "the first argument must be a required Tensor")
        return OpSchema(
            name=name,
            file=self.file,
            since=self.text("since", self.required("since")),
            summary=self.text("summary", self.required("summary")),
            schema=signature,
            dims=self.dims,
            let=self.let,
            arguments=arguments,
            outputs=tuple(self.read_outputs(returns)),
            where=tuple(self.read_where()),
            equation=str(self.document.get("equation", "")).rstrip(),
            notes=self.optional_text("notes"),
            source=self.text("source", self.required("source")),
            backward=tuple(self.names("backward", self.document.get("backward", []))),
            flops=self.expr("flops", self.document["flops"]) if "flops" in self.document else None,
            sizes=tuple(self.read_sizes(arguments)),
        )

    def signature(self, text: str) -> tuple[list[tuple[str, str, Any]], list[str]]:
        match = re.fullmatch(r"\((?P<arguments>.*)\) -> (?:Tensor|\((?P<returns>.*)\))", text)
        if match is None:
            self.fail("schema", f"expected '(arguments) -> Tensor' or '-> (Tensor a, ...)': {text}")
        arguments: list[tuple[str, str, Any]] = []
        # Not at the commas of a list.
        for part in filter(None, re.split(r", (?![^\[]*\])", match["arguments"])):
            item = re.fullmatch(r"(?P<type>[\w\[\]?]+) (?P<name>\w+)(?:=(?P<default>.+))?", part)
            if item is None or not (item["type"] in _TYPES or _FLAGS.fullmatch(item["type"])):
                self.fail("schema", f"cannot read {part!r}; types are {', '.join(_TYPES)}, bool[N]")
            default = self.default(part, item["type"], item["default"])
            if any(item["name"] == name for name, _, _ in arguments):
                self.fail("schema", f"argument {item['name']!r} stands twice")
            if default is REQUIRED and arguments and arguments[-1][2] is not REQUIRED:
                self.fail("schema", f"{item['name']!r} needs a default, as the argument before it")
            arguments.append((item["name"], item["type"], default))
        returns: list[str] = []
        for part in (match["returns"] or "").split(", "):
            item = re.fullmatch(r"Tensor (\w+)", part)
            if part and item is None:
                self.fail("schema", f"cannot read the return {part!r}; expected 'Tensor name'")
            returns += [item[1]] if item else []
        return arguments, returns

    def default(self, part: str, kind: str, text: str | None) -> Any:
        if text is None:
            return REQUIRED
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            self.fail("schema", f"the default of {part!r} is no literal")
        if flags := _FLAGS.fullmatch(kind):
            is_one = isinstance(value, list) and [type(v) for v in value] == [bool] * int(flags[1])
        else:
            allowed = _DEFAULTS[kind.removesuffix("?")]
            is_one = isinstance(value, allowed) or (value is None and kind.endswith("?"))
        if not is_one:
            self.fail("schema", f"the default of {part!r} is no {kind}")
        return value

    def read_dims(self) -> None:
        for letter, meaning in self.mapping("dims", self.required("dims")).items():
            if letter in self.types or not letter.isidentifier():
                self.fail(f"dims.{letter}", "must be a name that no argument has")
            if not isinstance(meaning, str) or not meaning.isidentifier():
                self.fail(f"dims.{letter}", f"expected a name such as num_tokens, got {meaning!r}")
            self.dims[letter] = meaning
        for letter, value in self.mapping("let", self.document.get("let", {})).items():
            if letter in self.types or letter in self.dims or not letter.isidentifier():
                self.fail(f"let.{letter}", "must be a name that no argument or dimension has")
            self.let[letter] = self.expr(f"let.{letter}", value)

    def expr(self, key: str, value: Any) -> Expr:
        text = str(value)
        try:
            node = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            self.fail(key, f"not an expression: {text!r} ({error.msg})")
        is_none = set()
        for item in ast.walk(node):
            if not isinstance(item, _NODES):
                self.fail(key, f"{type(item).__name__} is not allowed in {text!r}")
            if isinstance(item, ast.Compare) and isinstance(item.ops[0], (ast.Is, ast.IsNot)):
                is_none.add(item.left)
        for item in ast.walk(node):
            if not isinstance(item, ast.Name):
                continue
            kind = self.types.get(item.id)
            if item.id not in self.dims and item.id not in self.let and kind is None:
                self.fail(key, f"{item.id!r} in {text!r} is neither a dimension nor an argument")
            if kind is not None and kind.startswith("Tensor") and item not in is_none:
                self.fail(key, f"{item.id!r} in {text!r} is a tensor: only 'is None' may be asked")
        letters = {letter: expr.node for letter, expr in self.let.items()}
        return Expr(text, _copy(_Substitute(letters).visit(node)))

    def exprs(self, key: str, value: Any) -> tuple[Expr, ...]:
        if not isinstance(value, list):
            self.fail(key, f"expected a list of sizes, got {value!r}")
        return tuple(self.expr(f"{key}[{axis}]", item) for axis, item in enumerate(value))

    def names(self, key: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.fail(key, f"expected a list of names, got {value!r}")
        return value

    def flag(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, got {value!r}")
        return value

    def dtype(self, key: str, value: Any, tensors: Iterable[str], groups: Iterable[str]) -> str:
        text = self.text(key, value)
        if text not in tensors and text not in groups:
            self.fail(key, f"{text!r} is neither a dtype group nor an earlier tensor argument")
        return text

    def output_dtype(self, key: str, value: Any, tensors: Iterable[str]) -> str:
        accumulator = ACCUMULATOR.fullmatch(self.text(key, value))
        if accumulator and accumulator[1] in tensors:
            return accumulator[0]
        return self.dtype(key, value, tensors, ("float32", "int32"))

    def read_arguments(self, parsed: list[tuple[str, str, Any]]) -> Iterator[Argument]:
        declared = self.mapping("arguments", self.required("arguments"))
        names = [name for name, _, _ in parsed]
        if list(declared) != names:
            self.fail("arguments", f"expected {names} in this order, got {list(declared)}")
        tensors: list[str] = []
        for name, kind, default in parsed:
            key = f"arguments.{name}"
            is_tensor = kind.startswith("Tensor")
            known = self.TENSOR_KEYS if is_tensor else self.SCALAR_KEYS
            entry = self.mapping(key, declared[name], known)
            doc = self.text(f"{key}.doc", entry.get("doc"))
            if not is_tensor:
                yield self.read_scalar(key, entry, Argument(name, kind, default, doc))
                continue
            for needed in ("shape", "dtype"):
                if needed not in entry:
                    self.fail(f"{key}.{needed}", "the key is missing")
            yield Argument(
                name,
                kind,
                default,
                doc,
                shape=self.exprs(f"{key}.shape", entry["shape"]),
                dtype=self.dtype(f"{key}.dtype", entry["dtype"], tensors, DTYPES),
                values=self.values(f"{key}.values", entry.get("values"), names),
                grad=self.flag(f"{key}.grad", entry.get("grad", False)),
                advice=self.advice(f"{key}.advice", entry.get("advice", {})),
                autocast=self.flag(f"{key}.autocast", entry.get("autocast", False)),
            )
            if kind == "Tensor":
                tensors.append(name)

    def advice(self, key: str, value: Any) -> dict[str, str]:
        entries = self.mapping(key, value, {*QUANTISED, "quantised", "dtype", "any"})
        found = {given: self.text(f"{key}.{given}", text) for given, text in entries.items()}
        if "quantised" in found:
            shared = found.pop("quantised")
            found = {**dict.fromkeys(QUANTISED, shared), **found}
        return found

    def read_scalar(self, key: str, entry: dict[str, Any], argument: Argument) -> Argument:
        bounds = {
            bound: self.expr(f"{key}.{bound}", entry[bound])
            for bound in ("min", "max")
            if bound in entry
        }
        if bounds and argument.type not in ("SymInt", "float"):
            self.fail(f"{key}.{min(bounds)}", f"a {argument.type} has no range")
        choices = tuple(self.names(f"{key}.choices", entry.get("choices", [])))
        if choices and not argument.type.startswith("str"):
            self.fail(f"{key}.choices", f"a {argument.type} has no choices")
        if choices and isinstance(argument.default, str) and argument.default not in choices:
            self.fail(f"{key}.choices", f"the default {argument.default!r} is not among them")
        text_format = entry.get("format", "")
        if "format" in entry and (text_format not in FORMATS or argument.type != "str?"):
            self.fail(f"{key}.format", f"expected one of {', '.join(FORMATS)}, of a str?")
        return Argument(
            argument.name,
            argument.type,
            argument.default,
            argument.doc,
            format=text_format,
            minimum=bounds.get("min"),
            maximum=bounds.get("max"),
            choices=choices,
        )

    def values(self, key: str, value: Any, arguments: list[str]) -> str:
        if value is None:
            return ""
        text = self.text(key, value)
        match = VALUES.fullmatch(text)
        if match is None:
            self.fail(key, f"unknown kind of values {text!r}; the pattern is {VALUES.pattern}")
        if match["inverse"] and match["inverse"] not in arguments:
            self.fail(key, f"{match['inverse']!r} is not an argument")
        for letter in filter(None, (match["counts"], match["ids"])):
            self.expr(key, letter)
        return text

    def read_outputs(self, returns: list[str]) -> Iterator[Output]:
        declared = self.mapping("outputs", self.required("outputs"))
        if returns and list(declared) != returns:
            self.fail("outputs", f"expected {returns} in this order, got {list(declared)}")
        if not returns and len(declared) != 1:
            self.fail("outputs", f"the schema returns one Tensor, got {list(declared)}")
        tensors = [name for name, kind in self.types.items() if kind.startswith("Tensor")]
        for name, value in declared.items():
            key = f"outputs.{name}"
            entry = self.mapping(key, value, self.OUTPUT_KEYS)
            for needed in ("shape", "dtype"):
                if needed not in entry:
                    self.fail(f"{key}.{needed}", "the key is missing")
            conditions = {
                word: self.expr(f"{key}.{word}", entry[word])
                for word in ("if", "column_major")
                if word in entry
            }
            yield Output(
                name,
                self.exprs(f"{key}.shape", entry["shape"]),
                self.output_dtype(f"{key}.dtype", entry["dtype"], tensors),
                self.text(f"{key}.doc", entry.get("doc")),
                condition=conditions.get("if"),
                column_major=conditions.get("column_major"),
            )

    def read_where(self) -> Iterator[Where]:
        entries = self.document.get("where", [])
        if not isinstance(entries, list):
            self.fail("where", f"expected a list, got {entries!r}")
        for index, value in enumerate(entries):
            key = f"where[{index}]"
            entry = self.mapping(key, value, {"expect", "because"})
            if "expect" not in entry:
                self.fail(f"{key}.expect", "the key is missing")
            expect = self.expr(f"{key}.expect", entry["expect"])
            yield Where(expect, self.text(f"{key}.because", entry.get("because")))

    def read_sizes(self, arguments: tuple[Argument, ...]) -> Iterator[Size]:
        """In argument order, required tensors first: which axis binds a letter, which must agree.

        An axis that cannot be decided yet (its letters are bound by a later axis) waits.
        """
        required = [a for a in arguments if a.type == "Tensor"]
        optional = [a for a in arguments if a.type == "Tensor?"]
        bound: set[str] = set()
        waiting = [Size(a, axis, e) for a in required for axis, e in enumerate(a.shape)]
        while waiting:
            for size in waiting:
                unbound = sorted((size.expr.names & set(self.dims)) - bound)
                if not unbound:
                    yield size
                    break
                if len(unbound) == 1 and solve(size.expr.node, unbound[0], "size") is not None:
                    bound.add(unbound[0])
                    yield Size(size.argument, size.axis, size.expr, unbound[0])
                    break
            else:
                stuck = waiting[0]
                key = f"arguments.{stuck.argument.name}.shape[{stuck.axis}]"
                self.fail(key, f"no rule solves {stuck.expr.text!r} for its unbound dimension")
            waiting.remove(size)
        if missing := sorted(set(self.dims) - bound):
            self.fail(f"dims.{missing[0]}", "no required tensor has this dimension")
        for argument in optional:
            sizes = [Size(argument, axis, expr) for axis, expr in enumerate(argument.shape)]
            # A wrong scalar, such as a forgotten top_k, is named before the sizes derived from it.
            yield from sorted(sizes, key=lambda size: bool(size.expr.names & set(self.dims)))
