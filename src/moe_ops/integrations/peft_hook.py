# SPDX-License-Identifier: Apache-2.0
"""Let PEFT adapt quantised experts, without importing PEFT for those who do not use it."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType

from torch import nn

from moe_ops._core.after_import import after_import

_MODULE = "peft"


def install(model: nn.Module) -> None:
    """Make PEFT find the quantised weights of every model: now, or at the end of its import.

    Args:
        model: its experts have just been quantised. If PEFT has wrapped them already, the wrappers
            learn that.
    """
    module = sys.modules.get(_MODULE)
    if module is None:
        after_import(_MODULE, _install_in)
    elif not _is_being_imported(module):
        _install(model)


def _install(model: nn.Module | None = None) -> None:
    # Without a PEFT that we know, PEFT says itself that it finds no such parameter.
    with contextlib.suppress(ImportError):
        from moe_ops.integrations import peft

        peft.support_quantised(True)
        if model is not None:
            peft.attach(model)


def _install_in(_module: ModuleType) -> None:
    _install()


def _is_being_imported(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)
