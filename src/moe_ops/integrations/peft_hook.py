# SPDX-License-Identifier: Apache-2.0
"""Let PEFT adapt quantised experts, without importing PEFT for those who do not use it."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from torch import nn

_MODULE = "peft"


def install(model: nn.Module) -> None:
    """Make PEFT find the quantised weights of every model: now, or at the end of its import.

    Args:
        model: its experts have just been quantised. If PEFT has wrapped them already, the wrappers
            learn that.
    """
    module = sys.modules.get(_MODULE)
    if module is None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif not _is_being_imported(module):
        _install(model)


def _install(model: nn.Module | None = None) -> None:
    # Without a PEFT that we know, PEFT says itself that it finds no such parameter.
    with contextlib.suppress(ImportError):
        from moe_ops.integrations import peft

        peft.support_quantised(True)
        if model is not None:
            peft.attach(model)


def _is_being_imported(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of PEFT end with _install."""

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

            def execute_and_install(module: ModuleType) -> None:
                execute(module)
                _install()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec
