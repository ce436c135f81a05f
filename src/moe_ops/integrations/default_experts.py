# SPDX-License-Identifier: Apache-2.0
"""Choose the experts implementation of transformers models that name none, and say which they got.

transformers asks PreTrainedModel.get_correct_experts_implementation for the implementation of each
model that is built, with None where nobody named one. It offers no other place for a default.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe_ops.integrations.patch import MethodPatch

IMPLEMENTATION = "moe_ops"

logger = logging.getLogger("moe_ops")


@dataclass
class _State:
    """What install() made of this process.

    Attributes:
        is_default: whether models that name no implementation get moe_ops.
        told: modules of model classes that the log has spoken of.
    """

    is_default: bool = False
    told: set[str] = field(default_factory=set)


_state = _State()


def is_default() -> bool:
    """Tell whether models that name no experts implementation get moe_ops."""
    return _state.is_default


def install(default: bool) -> None:
    """Choose for every model that is built from now on.

    Args:
        default: whether models that name none get moe_ops. False leaves that as it was.
    """
    from transformers import PreTrainedModel

    _state.is_default = _state.is_default or default
    _patch.install(PreTrainedModel)


def uninstall() -> None:
    """Undo install(), however often it was called."""
    _patch.remove()
    _state.is_default = False
    _state.told.clear()


def _choose(original: Callable[..., str], self: Any, requested_experts: str | None) -> str:
    """Return the implementation of a model, as get_correct_experts_implementation does."""
    if requested_experts is not None or not _has_experts(type(self)):
        return original(self, requested_experts)
    chosen = original(self, IMPLEMENTATION if _state.is_default else None)
    _tell(type(self), chosen)
    return chosen


_patch = MethodPatch("get_correct_experts_implementation", _choose)


def _tell(model_class: type, chosen: str) -> None:
    """Say once for each family of models what a model got that named nothing."""
    if model_class.__module__ in _state.told:
        return
    _state.told.add(model_class.__module__)
    what = f"{model_class.__name__} names no experts implementation and got {chosen!r}"
    if chosen == IMPLEMENTATION:
        logger.info("moe_ops.integrations.transformers: %s, the default", what)
        return
    logger.warning(
        "moe_ops.integrations.transformers: %s (a saved model does not keep its own); pass "
        'experts_implementation="moe_ops", or call register(default=True)',
        what,
    )


def _has_experts(model_class: type) -> bool:
    """Tell whether a model class, or one that it derives from, uses transformers' experts interface."""
    from transformers import PreTrainedModel

    return any(
        _uses_interface(base.__module__)
        for base in model_class.__mro__
        if issubclass(base, PreTrainedModel) and base is not PreTrainedModel
    )


@functools.cache
def _uses_interface(module_name: str) -> bool:
    """Tell it by the module's source, as transformers does. Without source: no."""
    module = sys.modules.get(module_name)
    try:
        return module is not None and "@use_experts_implementation" in inspect.getsource(module)
    except (OSError, TypeError):
        return False
