# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of an implementation's first call beside each other.

Triton compiles a kernel when it is launched first, so a call of several kernels would compile one after
the other. But which kernels they are is known before the first of them runs: nothing that an
implementation does depends on what they compute. So its first call in a process goes through it twice.
The first time nothing is launched, and each launch hands its kernel to a thread that compiles it and
loads it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
import triton

# Threads that compile. Of more kernels than that a call has the most to wait for one of them.
_MOST_THREADS = 8

P = ParamSpec("P")
R = TypeVar("R")


class _Thread(threading.local):
    is_ahead = False


_thread = _Thread()


def is_ahead() -> bool:
    """Return whether this thread's launches are to compile their kernels and no more."""
    return _thread.is_ahead


def compiled_together(implementation: Callable[P, R]) -> Callable[P, R]:
    """Let the kernels of an implementation's first call compile beside each other.

    It must do nothing but allocate and launch, since its first call goes through it twice.
    """
    # A forward that keeps something for its backward has other kernels: that is a keyword.
    done: set[tuple[tuple[str, object], ...]] = set()

    @functools.wraps(implementation)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        form = tuple(kwargs.items())
        if form not in done and _launches(args):
            done.add(form)
            _compile(implementation, args, kwargs)
        return implementation(*args, **kwargs)

    return called


def _launches(args: tuple[Any, ...]) -> bool:
    """Return whether a call with these arguments launches: it is not of meta tensors, nor captured."""
    first = args[0]
    return (
        isinstance(first, torch.Tensor)
        and first.is_cuda
        and not torch.cuda.is_current_stream_capturing()
    )


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels for a device, and load them there.

    Where a kernel is loaded, Triton before 3.7 has a C compiler make its launcher: 0.25 s for each.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(min(_MOST_THREADS, os.cpu_count() or 1))
        self._device = device

    def submit(self, compile_kernel: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        return super().submit(self._make, compile_kernel)

    def _make(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                # Asking for what launches it loads it.
                kernel.run  # noqa: B018
        return kernel


def _compile(implementation: Callable[..., Any], args: Any, kwargs: Any) -> None:
    with ExitStack() as stack:
        executor = stack.enter_context(_Compilers(args[0].device))
        try:
            # What does not compile raises its error when it is launched.
            stack.enter_context(triton.AsyncCompileMode(executor, ignore_errors=True))
        except RuntimeError:
            # Somebody compiles ahead already.
            return
        _thread.is_ahead = True
        try:
            implementation(*args, **kwargs)
        finally:
            _thread.is_ahead = False
