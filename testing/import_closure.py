# SPDX-License-Identifier: Apache-2.0
"""Which modules of a source tree can be loaded, starting at some of them; nothing is imported.

An edge is an import, inside functions too, or a string that names a module: "a.b", "a.b:function",
or a line such as "import a.b" in a script that a test runs. Like code_digest.py this file needs
the standard library only.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from testing.code_digest import parse

# Packages whose files lie elsewhere than their names say; setup.py's package_dir has the same.
MOVED = {"moe_ops.op_schemas": Path("op_schemas")}

_MODULE_NAME = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(?::\w+)?")


def closure(root: Path, start: Iterable[str]) -> dict[str, Path]:
    """Return the modules that the modules `start` can load, themselves included, with their files.

    Packages above a module are loaded with it. Only modules with a file under `root` count.
    """
    found: dict[str, Path] = {}
    waiting = list(start)
    while waiting:
        parts = waiting.pop().split(".")
        for module in itertools.accumulate(parts, "{}.{}".format):
            file = None if module in found else source_file(root, module)
            if file is not None:
                found[module] = file
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                waiting += references(file.read_text(encoding="utf-8"), package)
    return found


def source_file(root: Path, module: str) -> Path | None:
    """Return the file of a module of the tree; None if it has none."""
    if module in MOVED:
        candidates = [root / MOVED[module] / "__init__.py"]
    else:
        path = Path(*module.split("."))
        candidates = [
            folder / file
            for folder in (root / "src", root)
            for file in (path.with_suffix(".py"), path / "__init__.py")
        ]
    return next((file for file in candidates if file.is_file()), None)


def module_name(root: Path, file: Path) -> str:
    """Return the name under which a file of the tree is imported."""
    relative = file.relative_to(root).with_suffix("")
    parts = relative.parts[relative.parts[0] == "src" :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def references(source: str, package: str) -> frozenset[str]:
    """Return every dotted name that the code of a module in `package` may load.

    Some are no modules: of `from a import b` comes a.b, whatever b is.
    """
    return frozenset(_references(parse(source), package))


def _references(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(above if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _references_of_text(node.value)


def _references_of_text(text: str) -> Iterator[str]:
    if match := _MODULE_NAME.fullmatch(text):
        yield match[1]
    for line in map(str.strip, text.splitlines()):
        if "import " in line:
            try:
                yield from _references(ast.parse(line), "")
            except SyntaxError:
                # An import that goes on in the next line, or a sentence of prose.
                yield from re.findall(r"^from ([\w.]+) import\b", line)
