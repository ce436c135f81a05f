# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of an implementation's first call beside each other.

Triton compiles a kernel when it is launched first, so a call of several kernels would compile one after
the other. But which kernels they are is known before the first of them runs: nothing that an
implementation does depends on what they compute. So before its first call in a process it is gone
through once more, and then nothing is launched: each launch hands its kernel to a thread that compiles
it and loads it. Where a forward records a gradient, that goes on through its backward: the values that
stand for gradients mean nothing, and nothing reads them.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
import triton

logger = logging.getLogger("moe_ops")

# Threads that compile: about as many as an op and its backward launch kernels.
_MOST_THREADS = 16

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
    # A forward has other kernels where it keeps something for its backward, which a keyword says.
    done: set[tuple[tuple[str, object], ...]] = set()

    @functools.wraps(implementation)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        form = tuple(kwargs.items())
        # Within a forward's first call a backward is no first call of its own: the real one may need
        # other gradients.
        if not is_ahead() and form not in done and _launches(args):
            done.add(form)
            _compile(args, lambda: implementation(*args, **kwargs))
        return implementation(*args, **kwargs)

    return called


def compiled_with_backward(
    implementation: Callable[..., R],
    go_through: Callable[[tuple[Any, ...], Callable[..., R]], None],
) -> Callable[..., R]:
    """Let the kernels of a forward's first call compile beside those of its backward.

    Args:
        implementation: the forward, which is compiled together, as what the backward calls is.
        go_through: called with a call's arguments and the forward, goes through it and its backward.
    """
    is_first = True

    def called(*args: Any) -> R:
        nonlocal is_first
        if is_first and _launches(args):
            is_first = False
            _compile(args, lambda: go_through(args, implementation))
        return implementation(*args)

    return called


def _launches(args: tuple[Any, ...]) -> bool:
    """Return whether a call with these arguments launches what others will.

    Not with meta tensors, nor without tokens, nor while it is captured.
    """
    first = args[0]
    return (
        isinstance(first, torch.Tensor)
        and first.is_cuda
        and first.numel() > 0
        and not torch.cuda.is_current_stream_capturing()
    )


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels for a device, and load them there.

    Where a kernel is loaded, Triton before 3.7 has a C compiler make its launcher: 0.25 s for each.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(min(_MOST_THREADS, os.cpu_count() or 1))
        self._device = device
        self.kernels: list[Future[Any]] = []

    def submit(self, compile_kernel: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        kernel = super().submit(self._make, compile_kernel)
        self.kernels.append(kernel)
        return kernel

    def _make(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                # Asking for what launches it loads it.
                kernel.run  # noqa: B018
        return kernel


def _compile(args: tuple[Any, ...], call: Callable[[], object]) -> None:
    """Make a call that launches nothing. Its kernels are there when this returns."""
    with ExitStack() as stack:
        executor = stack.enter_context(_Compilers(args[0].device))
        try:
            # What does not compile raises its error when it is launched.
            stack.enter_context(triton.AsyncCompileMode(executor, ignore_errors=True))
        except RuntimeError:
            # Somebody compiles ahead already.
            return
        if args[0].is_cuda:
            # Triton keeps the kernels of the current device apart, and launch makes it that one.
            stack.enter_context(torch.cuda.device(args[0].device))
        _thread.is_ahead = True
        try:
            call()
            # Triton before 3.7 stays in its mode if Ctrl-C meets its own wait.
            wait(executor.kernels)
        except Exception as error:  # noqa: BLE001
            # What is wrong with it shows where the call itself is made.
            logger.debug("moe_ops: kernels are not compiled ahead: %s", error)
        finally:
            _thread.is_ahead = False
