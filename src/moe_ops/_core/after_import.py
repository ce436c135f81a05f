# SPDX-License-Identifier: Apache-2.0
"""Acts at the end of another module's import, so that `import moe_ops` need not import it."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call action(module) whenever the import of the module `name` ends from now on.

    A second call with the same action changes nothing. A module that is there already is not told.
    """
    finder = _Finder(name, action)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


def _execute_and_act(
    action: Callable[[ModuleType], None], execute: Callable[[ModuleType], None], module: ModuleType
) -> None:
    execute(module)
    action(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as all others would, and lets its import end with an action."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Finder) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.name, self.action))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        # Looked up without this finder, which stays: being looked up is not being imported.
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(place, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            # A module that is reloaded has the loader that it was loaded with.
            if not (isinstance(execute, functools.partial) and execute.args[0] is self.action):
                acting = functools.partial(_execute_and_act, self.action, execute)
                spec.loader.exec_module = acting  # type: ignore[method-assign]
        return spec
