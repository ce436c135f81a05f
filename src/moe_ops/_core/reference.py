# SPDX-License-Identifier: Apache-2.0
"""Writes what an `OpSchema` says for people to read: docstrings and docs/ops/<op>.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_ops._core.schema import (
    ACCUMULATOR,
    DTYPES,
    FLOAT64_DEVICES,
    Argument,
    Expr,
    OpSchema,
    Output,
)

_RULES = (
    "Takes any strides; int32 and int64 indices give the same; deterministic bit for bit. The Triton "
    "implementation reads no device value on the host; the PyTorch one may."
)

_FUNC = (
    "torch.func.grad, vjp and jacrev raise RuntimeError, and jvp and jacfwd NotImplementedError; "
    "torch.autograd.grad gives the gradient."
)

_VMAP = (
    "torch.vmap calls the op once for each element of the batch, and torch warns that this is slow."
)

_LOAD = (
    "A program that loads an AOTInductor package or an exported program with this op must "
    '`import moe_ops` first. Without it torch raises "Could not find schema" or fails to '
    "deserialise."
)

_ERRORS = (
    "Each error names {op}, argument, expectation and what was given, and is the same in eager, fake "
    "and meta mode."
)


def docstring(schema: OpSchema) -> str:
    """Return the docstring of the op's public function."""
    parts = [
        schema.summary,
        textwrap.indent(schema.equation, "    ") if schema.equation else "",
        _paragraph(f"Letters: {_letters(schema)}."),
        _floating(schema),
        "Args:\n" + "\n".join(_items(_arguments(schema))),
        "Returns:\n" + "\n".join(_items(_outputs(schema))),
        "Raises:\n" + "\n".join(_items(_errors(schema))),
        _paragraph(f"{_differentiable(schema)} {_RULES}"),
        _paragraph(schema.notes),
        _paragraph(f"Source: {schema.source}."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(schema: OpSchema) -> str:
    """Return the reference page of the op, in Markdown."""
    lines = [
        f"<!-- Generated from op_schemas/{schema.file} by `make docs`; edit that file. -->",
        f"# moe::{schema.name}",
        schema.summary,
        f"```\n{_signature(schema)}\n```",
        f"```\n{schema.equation}\n```" if schema.equation else "",
        f"Letters: {_letters(schema)}.",
        _floating(schema),
        "## Arguments",
        _table(("name", "what", "meaning"), _arguments(schema)),
        "## Returns",
        _table(("name", "what", "meaning"), _outputs(schema)),
        "## Errors",
        _table(("error", "meaning"), ((kind, text) for kind, _, text in _errors(schema))),
        _ERRORS.format(op=f"the op {schema.runs_for}" if schema.runs_for else "op"),
        "## Gradient",
        f"{_differentiable(schema)} {_backward(schema)}".strip(),
        "## With the rest of PyTorch",
        "\n".join(f"- {text}" for text in _around(schema)),
        "## Rules",
        _RULES,
        schema.notes,
        f"FLOPs counted: `{schema.flops.text}`." if schema.flops else "",
        f"Since {schema.since}. Source: {schema.source}.",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def write_pages(schemas: dict[str, OpSchema], directory: Path) -> list[Path]:
    """Write the page of every op and an index; return the files whose text changed."""
    pages = {f"{name}.md": page(schema) for name, schema in schemas.items()}
    pages["README.md"] = _index(schemas)
    directory.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, text in pages.items():
        file = directory / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            changed.append(file)
    for file in sorted(directory.glob("*.md")):
        if file.name not in pages:
            file.unlink()
            changed.append(file)
    return changed


def _index(schemas: dict[str, OpSchema]) -> str:
    rows = ((f"[{name}]({name}.md)", schema.summary) for name, schema in schemas.items())
    lines = [
        "<!-- Generated from op_schemas/ by `make docs`. -->",
        "# The ops",
        "All are in the namespace `torch.ops.moe`.",
        _table(("op", "what it does"), rows),
    ]
    return "\n\n".join(lines) + "\n"


def _signature(schema: OpSchema) -> str:
    """Return the op's signature with a line for each argument, which a phone shows whole."""
    inside, arrow, result = schema.schema.removeprefix("(").rpartition(") -> ")
    arguments = "".join(f"    {argument},\n" for argument in inside.split(", "))
    return f"torch.ops.moe.{schema.name}(\n{arguments}{arrow}{result}"


def _around(schema: OpSchema) -> Iterator[str]:
    """Yield what autocast, torch.func and vmap do, and what a caller must not do."""
    cast = [argument.name for argument in schema.arguments if argument.autocast]
    yield (
        f"Autocast casts {_list(cast)} to its dtype, fp64 excepted, and nothing else."
        if cast
        else "Autocast casts nothing."
    )
    if any(argument.grad for argument in schema.arguments):
        if name := saved(schema):
            yield (
                f"The backward reads {name} as it was. Changing it in place before the backward, "
                f"as `{name} += 1` does, makes the backward raise RuntimeError. Write "
                f"`{name} = {name} + 1`."
            )
        yield _FUNC
    yield _VMAP
    yield _LOAD


# What ops save for their backwards and callers are tempted to change, by name. An op that takes ids
# makes indices of its own from them, and saves these.
_SAVED = ("sent_slots", "token_counts", "gather_indices", "topk_weights")


def saved(schema: OpSchema) -> str:
    """Return a tensor that a differentiable op saves; tests/docs/test_ops_pages.py holds that."""
    made = [output.name for output in schema.outputs]
    names = {*made, *(argument.name for argument in schema.tensors if not argument.is_optional)}
    if "topk_ids" in made:
        return "topk_ids"
    return next((name for name in _SAVED if name in names), "")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 96)


def _items(rows: Iterator[tuple[str, str, str]]) -> Iterator[str]:
    for name, what, meaning in rows:
        head = f"{name} ({what})" if what else name
        yield textwrap.fill(
            f"{head}: {meaning}", 96, initial_indent="    ", subsequent_indent="        "
        )


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _letters(schema: OpSchema) -> str:
    letters = [f"{letter} {name}" for letter, name in schema.dims.items()]
    return ", ".join(letters + [f"{letter} = {e.text}" for letter, e in schema.let.items()])


def _floating(schema: OpSchema) -> str:
    """Return what dtypes "floating" stands for; nothing where no argument is floating."""
    if all(argument.dtype != "floating" for argument in schema.tensors):
        return ""
    anywhere = ", ".join(dtype for dtype in DTYPES["floating"] if dtype != "float64")
    return f"Floating: {anywhere}; float64 on {FLOAT64_DEVICES[0].upper()}."


def _shape(shape: tuple[Expr, ...]) -> str:
    sizes = ", ".join(expr.text for expr in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _dtype(schema: OpSchema, dtype: str) -> str:
    if accumulator := ACCUMULATOR.fullmatch(dtype):
        return f"fp32, or fp64 for fp64 {accumulator[1]}"
    if dtype == "floating":
        return dtype
    if dtype in DTYPES:
        return " or ".join(DTYPES[dtype])
    return f"dtype of {dtype}" if schema.argument(dtype).is_tensor else f"in {dtype}"


def _arguments(schema: OpSchema) -> Iterator[tuple[str, str, str]]:
    for argument in schema.arguments:
        yield argument.name, _what(schema, argument), argument.doc


def _what(schema: OpSchema, argument: Argument) -> str:
    if argument.is_tensor:
        what = f"Tensor {_shape(argument.shape)}, {_dtype(schema, argument.dtype)}"
        return what + (", optional" if argument.is_optional else "")
    what = argument.type.replace("SymInt", "int").replace("?", " or None")
    if argument.choices:
        what = "one of " + ", ".join(map(str, argument.choices))
    bounds = [
        f"{sign} {bound.text}"
        for bound, sign in ((argument.minimum, ">="), (argument.maximum, "<="))
        if bound is not None
    ]
    if bounds:
        what += " " + " and ".join(bounds)
    return what + (f", default {argument.default!r}" if argument.has_default else "")


def _outputs(schema: OpSchema) -> Iterator[tuple[str, str, str]]:
    for output in schema.outputs:
        yield (
            output.name,
            f"Tensor {_shape(output.shape)}, {_dtype(schema, output.dtype)}",
            _said(output),
        )


def _said(output: Output) -> str:
    said = output.doc
    if output.column_major is not None:
        said += f" Stored with its last two dimensions swapped where {output.column_major.text}."
    if output.condition is not None:
        said += f" Empty, shape (0,), unless {output.condition.text}."
    return said


def _errors(schema: OpSchema) -> Iterator[tuple[str, str, str]]:
    yield "TypeError", "", "A dtype other than those above."
    yield "ValueError", "", "A rank or a size that disagrees with the shapes above; mixed devices."
    for argument in schema.tensors:
        yield from _advice(argument)
    if refused := [a.name for a in schema.without_gradient if not a.ignores_grad]:
        yield "ValueError", "", f"{_list(refused, 'or')} requires grad, and a gradient is recorded."
    limited = [
        a.name
        for a in schema.scalars
        if a.type != "ScalarType" and (a.minimum or a.maximum or a.choices or a.format)
    ]
    if limited:
        yield "ValueError", "", f"A value out of range or unknown: {', '.join(limited)}."
    for where in schema.where:
        yield "ValueError", "", f"Expected `{where.expect.text}`: {where.because}."


def _advice(argument: Argument) -> Iterator[tuple[str, str, str]]:
    said: dict[str, list[str]] = {}
    for given, text in argument.advice.items():
        if given != argument.dtype:
            said.setdefault(text, []).append(given)
    for text, dtypes in said.items():
        if dtypes == ["any"]:
            yield "TypeError or ValueError", "", f"Another {argument.name}: {text}."
        elif dtypes == ["dtype"]:
            yield "TypeError", "", f"{argument.name} in another dtype: {text}."
        else:
            yield "TypeError", "", f"{argument.name} in {' or '.join(dtypes)}: {text}."


def _differentiable(schema: OpSchema) -> str:
    names = [a.name for a in schema.arguments if a.grad]
    if not names:
        return "Not differentiable."
    said = [f"Differentiable in {_list(names)}."]
    for ignored, rule in ((False, "must not require grad"), (True, "may require grad")):
        if without := [a.name for a in schema.without_gradient if a.ignores_grad == ignored]:
            verb = "has" if len(without) == 1 else "have"
            said.append(f"{_list(without)} {verb} no gradient and {rule}.")
    return " ".join(said)


def _list(names: Sequence[str], word: str = "and") -> str:
    *others, last = names
    return f" {word} ".join(filter(None, (", ".join(others), last)))


def _backward(schema: OpSchema) -> str:
    ops = " and ".join(f"[{name}]({name}.md)" for name in schema.backward)
    return f"Its backward calls {ops}." if ops else ""
