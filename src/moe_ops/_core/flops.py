# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas for torch.utils.flop_counter, registered when somebody imports it.

Importing it costs 100 to 240 ms, since it imports Triton, so `import moe_ops` does not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register(op: Any, formula: Callable[..., int]) -> None:
    """Registers `formula`, called with the op's own arguments, for the OpOverloadPacket `op`."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        module.register_flop_formula(op, get_raw=True)(formula)
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.append((op, formula))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of torch.utils.flop_counter end with the registration of what waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
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

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                for op, formula in _waiting:
                    module.register_flop_formula(op, get_raw=True)(formula)
                _waiting.clear()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
