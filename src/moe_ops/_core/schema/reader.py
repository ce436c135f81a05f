# SPDX-License-Identifier: Apache-2.0
"""Reads YAML documents into `OpSchema` objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import MalformedError, SchemaError
from .expressions import Expr, parse
from .like import Likes
from .model import (
    ACCUMULATOR,
    DTYPES,
    FORMATS,
    QUANTISED,
    VALUES,
    Argument,
    OpSchema,
    Output,
    Where,
)
from .signature import parse_signature
from .sizes import bind_sizes

# Stands for the key in errors about a file as a whole.
WHOLE_FILE = "(whole file)"


def load_all(directory: Path | Any) -> dict[str, OpSchema]:
    """Read every *.yaml of a directory (a Path, or a Traversable of importlib.resources)."""
    documents = {
        file.name.removesuffix(".yaml"): _document(file.read_text(encoding="utf-8"), file.name)
        for file in sorted(directory.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }
    likes = Likes(documents)
    schemas = {op: _Reader(op, likes).read() for op in documents}
    for schema in schemas.values():
        for name in schema.backward:
            if name not in schemas:
                raise SchemaError(schema.file, "backward", f"there is no op named {name!r}")
        if schema.runs_for and schema.runs_for not in schemas:
            reason = f"there is no op named {schema.runs_for!r}"
            raise SchemaError(schema.file, "runs_for", reason)
    return schemas


def load(text: str, file: str) -> OpSchema:
    """Read one schema from YAML text; errors name `file`."""
    op = file.removesuffix(".yaml")
    return _Reader(op, Likes({op: _document(text, file)})).read()


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C loader where PyYAML has it (10x faster). It refuses keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice")
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def _document(text: str, file: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SchemaError(file, WHOLE_FILE, f"not valid YAML: {error}") from None


class _Reader:
    """Reads one document. Every error names the file, the key and the reason."""

    KEYS = {
        "op", "since", "summary", "equation", "schema", "dims", "let", "arguments", "where",
        "outputs", "runs_for", "backward", "flops", "notes", "source",
    }  # fmt: skip
    TENSOR_KEYS = {
        "shape", "dtype", "values", "stands_for", "grad", "autocast", "advice", "doc",
    }  # fmt: skip
    SCALAR_KEYS = {"min", "max", "choices", "format", "doc"}
    OUTPUT_KEYS = {"shape", "dtype", "if", "column_major", "doc"}

    def __init__(self, op: str, likes: Likes) -> None:
        self.op = op
        self.likes = likes
        self.file = f"{op}.yaml"
        self.document = self.mapping(WHOLE_FILE, likes.documents[op], self.KEYS)
        likes.check_places(op)
        self.dims: dict[str, str] = {}
        self.let: dict[str, Expr] = {}
        self.types: dict[str, str] = {}

    def fail(self, key: str, reason: str) -> NoReturn:
        raise SchemaError(self.file, key, reason)

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Add the file and the key to the reason why something is malformed."""
        try:
            yield
        except MalformedError as error:
            raise SchemaError(self.file, error.key or key, str(error)) from None

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
        with self.at("schema"):
            parsed, returns = parse_signature(signature)
        self.types = {argument: kind for argument, kind, _ in parsed}
        self.read_dims()
        arguments = tuple(self.read_arguments(parsed))
        if not arguments or arguments[0].type != "Tensor":
            self.fail("schema", "the first argument must be a required Tensor")
        with self.at("dims"):
            sizes = tuple(bind_sizes(arguments, self.dims))
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
            runs_for=self.optional_text("runs_for"),
            backward=tuple(self.names("backward", self.document.get("backward", []))),
            flops=self.expr("flops", self.document["flops"]) if "flops" in self.document else None,
            sizes=sizes,
        )

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
        with self.at(key):
            return parse(str(value), self.dims, self.let, self.types)

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

    def grad(self, key: str, value: Any) -> bool:
        if value != "ignored" and not isinstance(value, bool):
            self.fail(key, f"expected true, false or ignored, got {value!r}")
        return value is True

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
            self.mapping(key, declared[name])
            entry = self.mapping(key, self.likes.argument(self.op, name), known)
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
                stands_for=self.stands_for(f"{key}.stands_for", entry.get("stands_for", "")),
                grad=self.grad(f"{key}.grad", entry.get("grad", False)),
                ignores_grad=entry.get("grad") == "ignored",
                advice=self.advice(f"{key}.advice", entry.get("advice", {})),
                autocast=self.flag(f"{key}.autocast", entry.get("autocast", False)),
            )
            if kind == "Tensor":
                tensors.append(name)

    def stands_for(self, key: str, value: Any) -> str:
        if value and (not isinstance(value, str) or not value.isidentifier()):
            self.fail(key, f"expected a name such as weight, got {value!r}")
        return str(value)

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
        choices = self.choices(f"{key}.choices", entry.get("choices", []), argument)
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

    def choices(self, key: str, value: Any, argument: Argument) -> tuple[Any, ...]:
        if argument.type == "SymInt":
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                self.fail(key, f"expected a list of integers, got {value!r}")
            return tuple(value)
        names = tuple(self.names(key, value))
        if argument.type == "ScalarType":
            if not names or not set(names) <= set(DTYPES["floating"]):
                self.fail(key, f"expected some of {', '.join(DTYPES['floating'])}, got {value!r}")
        elif names and not argument.type.startswith("str"):
            self.fail(key, f"a {argument.type} has no choices")
        return names

    def values(self, key: str, value: Any, arguments: list[str]) -> str:
        if value is None:
            return ""
        text = self.text(key, value)
        match = VALUES.fullmatch(text)
        if match is None:
            self.fail(key, f"unknown kind of values {text!r}; the pattern is {VALUES.pattern}")
        for other in filter(None, (match["inverse"], match["format"], match["scales"])):
            if other not in arguments:
                self.fail(key, f"{other!r} is not an argument")
        for letter in filter(None, (match["counts"], match["ids"])):
            self.expr(key, letter)
        return text

    def read_outputs(self, returns: list[str]) -> Iterator[Output]:
        declared = self.mapping("outputs", self.required("outputs"))
        if returns and list(declared) != returns:
            self.fail("outputs", f"expected {returns} in this order, got {list(declared)}")
        if not returns and len(declared) != 1:
            self.fail("outputs", f"the schema returns one Tensor, got {list(declared)}")
        kinds = ("Tensor", "Tensor?", "ScalarType")
        named = [name for name, kind in self.types.items() if kind in kinds]
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
                self.output_dtype(f"{key}.dtype", entry["dtype"], named),
                self.text(f"{key}.doc", entry.get("doc")),
                condition=conditions.get("if"),
                column_major=conditions.get("column_major"),
            )

    def read_where(self) -> Iterator[Where]:
        entries = self.document.get("where", [])
        if not isinstance(entries, list):
            self.fail("where", f"expected a list, got {entries!r}")
        for key, value in self.likes.where(self.op):
            entry = self.mapping(key, value, {"expect", "because"})
            if "expect" not in entry:
                self.fail(f"{key}.expect", "the key is missing")
            expect = self.expr(f"{key}.expect", entry["expect"])
            yield Where(expect, self.text(f"{key}.because", entry.get("because")))
