# SPDX-License-Identifier: Apache-2.0
"""Put a function in place of another library's method, and take it away again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


class MethodPatch:
    """Calls `replacement(original, self, *args, **kwargs)` in place of a class's method.

    Where another library wraps the method after us, its wrapper stays when we go, and what we left
    under it hands every call on to the original.
    """

    def __init__(self, name: str, replacement: Callable[..., Any]) -> None:
        """Take the method's name, and what is called in its place. Nothing is changed yet."""
        self._name = name
        self._replacement = replacement
        self._lock = threading.Lock()
        # The class, what we put there, and what stood there before.
        self._installed: tuple[type, Callable[..., Any], Callable[..., Any]] | None = None

    def install(self, owner: type) -> None:
        """Patch a class that defines the method itself. Where we are there already, do nothing."""
        with self._lock:
            if self._installed is not None:
                return
            original = getattr(owner, self._name)
            method = self._method(original)
            setattr(owner, self._name, method)
            self._installed = owner, method, original

    def remove(self) -> None:
        """Put the original back. Without install() before, do nothing."""
        with self._lock:
            if self._installed is None:
                return
            owner, method, original = self._installed
            self._installed = None
            if getattr(owner, self._name) is method:
                setattr(owner, self._name, original)

    def _method(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            installed = self._installed
            if installed is None or installed[1] is not method:
                return original(*args, **kwargs)
            return self._replacement(original, *args, **kwargs)

        return method
