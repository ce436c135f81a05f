# SPDX-License-Identifier: Apache-2.0
"""Watch one call of an implementation: what it allocates and what it launches.

Slots number the tensors of a call: first its inputs, then those that it allocates.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ops._triton.direct import Pointer

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
_ZEROS = {_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default}


Tensors = torch.Tensor | tuple[torch.Tensor, ...]


class UnrecordableError(Exception):
    """Say why a call cannot be recorded."""


class Launch(Protocol):
    """Work for the GPU that differs in addresses only."""

    @property
    def slots(self) -> set[int]:
        """Return the slots whose memory it reads or writes."""

    def __call__(self, addresses: list[int], stream: int) -> None:
        """Do it; addresses[slot] is where the slot's tensor lies now."""


class Driver(Protocol):
    """What makes launches: direct.Cuda, or a stand-in where there is no GPU."""

    def launch(self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any]) -> Launch:
        """Make the launch of a kernel, or raise NotImplementedError."""

    def zero(self, pointer: Pointer, size: int) -> Launch:
        """Make what zeros so many bytes."""

    def is_current(self, index: int) -> bool:
        """Return whether the device is the current one."""

    def stream(self, index: int) -> int:
        """Return the device's current stream."""


class Buffer(NamedTuple):
    """A tensor that a call allocates."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


class Recorder(TorchDispatchMode):
    """Watch the call that is made inside `with`.

    Nothing that goes wrong here reaches the call: it becomes the obstacle, why the call cannot be
    recorded.

    Args:
        inputs: the tensors that the call gets, and None for those that it does not. The first is a
            tensor. No two share memory.
        driver: what makes launches.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping would import torch._dynamo, which takes a second.
        return False

    def __init__(self, inputs: Sequence[torch.Tensor | None], driver: Driver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert inputs[0] is not None
        self.driver, self._device = driver, inputs[0].device
        self.num_inputs = len(inputs)
        self.buffers: list[Buffer] = []
        self.launches: list[Launch] = []
        self.obstacle: str | None = None
        # Where each slot's memory begins and ends. Memory that was freed may be allocated again:
        # then the newest slot counts.
        self._ranges = [memory_range(t) for t in inputs]

    def __enter__(self) -> Recorder:
        _thread.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _thread.recorder = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.obstacle is None:
            with self._obstacles(str(func)):
                self._note(func, args, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func in _EMPTY:
            self._allocated(result)
        elif func in _ZEROS:
            self._allocated(result)
            self._zeroed(result)
        elif func is _aten.zero_.default:
            self._zeroed(result)
        elif func._schema.is_mutable or not _is_view(result, args):
            raise UnrecordableError("it computes")

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]
    ) -> None:
        """Note a launch: the kernel, what Triton compiled it to, and its positional arguments."""
        if self.obstacle is None:
            with self._obstacles(kernel.__name__):
                values = dict(zip(kernel.arg_names, map(self._value, arguments), strict=False))
                self.launches.append(self.driver.launch(compiled, grid, values))

    @contextlib.contextmanager
    def _obstacles(self, what: str) -> Iterator[None]:
        # Another Triton may lack anything that direct.py reads: then Triton goes on launching.
        try:
            yield
        except Exception as reason:  # noqa: BLE001
            self.obstacle = f"{what}: {reason!r}"

    def _value(self, argument: Any) -> Any:
        """Return an argument with pointers in place of tensors."""
        if isinstance(argument, torch.Tensor):
            return self.pointer(argument)
        if hasattr(argument, "block_shape"):  # a descriptor of Triton's or of Gluon's
            return self.pointer(argument.base), argument
        return argument

    def pointer(self, tensor: torch.Tensor) -> Pointer | None:
        """Return where a tensor lies; None if it has no memory."""
        address = tensor.data_ptr()
        if address == 0:
            return None
        for slot in reversed(range(len(self._ranges))):
            begin, end = self._ranges[slot]
            if begin <= address < end:
                return Pointer(slot, address - begin)
        raise UnrecordableError("a tensor is neither an argument nor allocated by the call")

    def _allocated(self, tensor: torch.Tensor) -> None:
        if tensor.device != self._device:
            # Nothing that a launch could use: a meta tensor, for its strides.
            return
        num_bytes = tensor.untyped_storage().nbytes()
        self.buffers.append(Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype, num_bytes))
        begin = tensor.data_ptr()
        self._ranges.append((begin, begin + num_bytes))

    def _zeroed(self, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise UnrecordableError("it zeros a tensor that is not contiguous")
        if (pointer := self.pointer(tensor)) is not None:
            self.launches.append(self.driver.zero(pointer, tensor.numel() * tensor.itemsize))


def share_memory(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Return whether the memory of any two tensors overlaps."""
    taken = sorted(r for r in map(memory_range, tensors) if r[0] < r[1])
    return any(a[1] > b[0] for a, b in itertools.pairwise(taken))


def memory_range(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Return the addresses between which the elements of a tensor lie; (0, 0) if it has none."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.itemsize


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an op that writes nothing returned views of its arguments only.

    Where there is no memory nobody could tell: a collective of nothing is no view.
    """
    given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)} - {0}
    made = result if isinstance(result, (tuple, list)) else (result,)
    # A number that an op returns may be a tensor's value.
    return all(
        isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in given for t in made
    )


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


def recorder() -> Recorder | None:
    """Return what watches the call that this thread is in, if anything does."""
    return _thread.recorder
