# SPDX-License-Identifier: Apache-2.0
"""Resolves `like`, with which a schema takes over what the schema of an op says already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from .errors import SchemaError

# What autograd and autocast do with an argument is each op's own.
_NEVER_TAKEN_OVER = ("doc", "grad", "autocast")
# The keys of an argument that may be like another's on their own.
_SINGLE_KEYS = ("advice", "doc")


class Likes:
    """Resolves `like` among YAML documents, given by the name of their op.

    An error names the file and the key of the `like` that cannot be resolved.
    """

    def __init__(self, documents: Mapping[str, Any]) -> None:
        self.documents = documents

    def argument(self, op: str, name: str, path: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return what the document of `op` says about an argument, with every `like` resolved.

        `path` holds the arguments whose `like` led here.
        """
        entry = dict(self.documents[op]["arguments"][name])
        path = (*path, f"{op}.{name}")
        key = f"arguments.{name}"
        for single in _SINGLE_KEYS:
            if _is_like(entry.get(single)):
                entry[single] = self._single_key(op, f"{key}.{single}", entry[single], path)
        if "like" in entry:
            target = entry.pop("like")
            other = self._follow(op, f"{key}.like", target, path)
            taken = {k: v for k, v in other.items() if k not in _NEVER_TAKEN_OVER}
            entry = {**taken, **self._reference(op, target), **entry}
        return entry

    def where(self, op: str, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """Yield each rule of `op` with its key. A rule taken over has the key of its `like`."""
        for index, entry in enumerate(self.documents[op].get("where", [])):
            key = f"where[{index}]"
            if not _is_like(entry):
                yield key, entry
                continue
            target = entry["like"]
            if len(entry) > 1:
                _fail(op, f"{key}.like", "stands alone: expect and because are the other op's")
            if not isinstance(target, str) or target not in self.documents:
                _fail(op, f"{key}.like", f"there is no op named {target!r}")
            if target in (*path, op):
                _fail(op, f"{key}.like", _circle((*path, op, target)))
            rules = self.documents[target]
            if not isinstance(rules, dict) or not isinstance(rules.get("where"), list):
                _fail(op, f"{key}.like", f"{target} has no where")
            for _, rule in self.where(target, (*path, op)):
                yield f"{key}.like", rule

    def check_places(self, op: str) -> None:
        """Refuse a `like` where none is resolved."""
        for key in _places(self.documents[op], ""):
            if not re.fullmatch(r"arguments\.\w+(\.(advice|doc))?|where\[\d+\]", key):
                _fail(
                    op,
                    f"{key}.like".removeprefix("."),
                    "only an argument, its advice, its doc and an entry of where can be like another",
                )

    def _follow(self, op: str, key: str, target: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """Return what the op that `target` names says about its argument."""
        match = re.fullmatch(r"(\w+)\.(\w+)", target) if isinstance(target, str) else None
        if match is None:
            _fail(op, key, f"expected op.argument, got {target!r}")
        other, name = match.groups()
        if other not in self.documents:
            _fail(op, key, f"there is no op named {other!r}")
        document = self.documents[other]
        arguments = document.get("arguments") if isinstance(document, dict) else None
        if not isinstance(arguments, dict) or not isinstance(arguments.get(name), dict):
            _fail(op, key, f"{other} has no argument {name!r}")
        if target in path:
            _fail(op, key, _circle((*path, target)))
        return self.argument(other, name, path)

    def _single_key(self, op: str, key: str, value: dict[str, Any], path: tuple[str, ...]) -> Any:
        """Return the value of the one key that is like another argument's."""
        target, name = value["like"], key.rpartition(".")[2]
        other = self._follow(op, f"{key}.like", target, path)
        if not isinstance(other.get(name), dict if name == "advice" else str):
            _fail(op, f"{key}.like", f"{target} has no {name}")
        own = {k: v for k, v in value.items() if k != "like"}
        if name == "advice":
            return {**other[name], **own}
        if own:
            _fail(op, f"{key}.like", f"stands alone: a {name} is one text")
        return other[name]

    def _reference(self, op: str, target: str) -> dict[str, str]:
        """Return the doc of an argument that has none of its own: it refers to the other op."""
        other = target.partition(".")[0]
        if other == op:
            return {}
        backward = self.documents[other].get("backward")
        is_forward = isinstance(backward, list) and op in backward
        return {"doc": "As in the forward." if is_forward else f"As in {other}."}


def _is_like(value: Any) -> bool:
    return isinstance(value, dict) and "like" in value


def _circle(path: tuple[str, ...]) -> str:
    return f"goes in a circle: {' -> '.join(path)}"


def _places(value: Any, key: str) -> Iterator[str]:
    """Yield the key of each mapping below `value` that has a `like`."""
    if _is_like(value) and isinstance(value["like"], str):
        yield key
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _places(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, f"{key}[{index}]")


def _fail(op: str, key: str, reason: str) -> NoReturn:
    raise SchemaError(f"{op}.yaml", key, reason)
