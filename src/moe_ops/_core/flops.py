# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas for torch.utils.flop_counter, registered when somebody imports it.

Importing it costs 100 to 240 ms, since it imports Triton, so `import moe_ops` does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_ops._core.after_import import after_import

_MODULE = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register(op: Any, formula: Callable[..., int]) -> None:
    """Registers `formula`, called with the op's own arguments, for the OpOverloadPacket `op`."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        module.register_flop_formula(op, get_raw=True)(formula)
        return
    after_import(_MODULE, _register_what_waits)
    _waiting.append((op, formula))


def _register_what_waits(module: ModuleType) -> None:
    for op, formula in _waiting:
        module.register_flop_formula(op, get_raw=True)(formula)
    _waiting.clear()
