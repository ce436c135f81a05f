# SPDX-License-Identifier: Apache-2.0
"""Record what an implementation allocates and launches, and do the same again without its Python.

An implementation in Triton allocates tensors and launches kernels. It never reads a value of a
tensor. So all that it does follows from its arguments' sizes, strides, dtypes and alignment, and
from the arguments that are no tensors. The second call with the same ones is recorded. Later ones
replay the record: they allocate, put the new addresses into the packed launches (direct.py), and
launch. An op's first call in a process is not counted: it loads the implementation.

    key of the arguments -> record -> steps: allocate, launch, free

A record holds no tensor. It frees a temporary tensor behind the last launch that uses it. Small
temporary tensors share one allocation; outputs never do.

Whatever cannot be recorded is called as before, each time: if Triton has launch hooks, if the
implementation calls an op of torch that computes, or if a kernel cannot be launched directly.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import knobs

from moe_ops._triton.direct import Cuda
from moe_ops._triton.launch import precision
from moe_ops._triton.recorder import (
    Buffer,
    Driver,
    Launch,
    Recorder,
    Tensors,
    UnrecordableError,
    memory_range,
    recorder,
    share_memory,
)
from moe_ops.configs import cache

logger = logging.getLogger("moe_ops")

# Temporary tensors of at most this many bytes share an allocation.
_SMALL = 256 * 1024
# Addresses in it are multiples of this, as the caching allocator's are.
_ALIGNMENT = 512


class Output(NamedTuple):
    """A tensor that a call returns; `view` is its size, stride and offset if it is no whole one."""

    slot: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


class _Step(NamedTuple):
    allocate: tuple[tuple[int, Buffer], ...]
    launch: Launch
    free: tuple[int, ...]


class Record:
    """What one call allocates, launches and returns, without its tensors.

    Args:
        watched: what watched the call.
        result: what the call returned.
        first: its first argument.

    Raises:
        UnrecordableError: it cannot be done again from the record alone.
    """

    def __init__(self, watched: Recorder, result: Tensors, first: torch.Tensor) -> None:
        if watched.obstacle is not None:
            raise UnrecordableError(watched.obstacle)
        self._driver = watched.driver
        self._device, self._index = first.device, first.get_device()
        # A setting of torch's, which may change, decides that of fp32 alone.
        self._precision = precision(first.dtype) if first.dtype == torch.float32 else None
        self._is_tuple = isinstance(result, tuple)
        buffers = dict(enumerate(watched.buffers, watched.num_inputs))
        self._later_slots = [0] * len(buffers)
        returned = result if isinstance(result, tuple) else (result,)
        self._outputs = [_output(watched, buffers, t) for t in returned]
        kept = [output.slot for output in self._outputs]
        if len(set(kept)) != len(kept):
            raise UnrecordableError("two outputs share memory")
        self._small, self._small_bytes = _share(buffers, kept)
        self._steps = _steps(watched.launches, buffers, kept, self._small)
        used = {slot for step in self._steps for slot, _ in step.allocate}
        # Outputs that no launch writes have no elements.
        self._untouched = [(slot, buffers[slot]) for slot in kept if slot not in used]
        # Two threads must not fill the same launches at a time.
        self._lock = threading.Lock()

    def __call__(self, *addresses: int) -> Tensors | None:
        """Do the call again with other tensors; None if it must be done in Python this time."""
        if _has_hooks() or self.is_stale():
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._driver.is_current(self._index):
                return self._replay([*addresses, *self._later_slots])
            with torch.cuda.device(self._index):
                return self._replay([*addresses, *self._later_slots])
        finally:
            self._lock.release()

    def is_stale(self) -> bool:
        """Return whether products of fp32 are now computed otherwise than in the recorded call."""
        return self._precision not in (None, precision(torch.float32))

    def _replay(self, addresses: list[int]) -> Tensors:
        device, empty = self._device, torch.empty_strided
        tensors: dict[int, torch.Tensor] = {}
        if self._small:
            shared = torch.empty(self._small_bytes, dtype=torch.uint8, device=device)
            begin = shared.data_ptr()
            for slot, offset in self._small:
                addresses[slot] = begin + offset
        stream = self._driver.stream(self._index)
        for allocate, launch, free in self._steps:
            for slot, (size, stride, dtype, _) in allocate:
                tensors[slot] = made = empty(size, stride, dtype=dtype, device=device)
                addresses[slot] = made.data_ptr()
            launch(addresses, stream)
            for slot in free:
                del tensors[slot]
        for slot, (size, stride, dtype, _) in self._untouched:
            tensors[slot] = empty(size, stride, dtype=dtype, device=device)
        outputs = tuple(
            tensors[slot] if view is None else tensors[slot].as_strided(*view)
            for slot, view in self._outputs
        )
        return outputs if self._is_tuple else outputs[0]


def _output(watched: Recorder, buffers: dict[int, Buffer], tensor: torch.Tensor) -> Output:
    """Return how to make an output; its buffer takes the output's order if it is all of it."""
    pointer = watched.pointer(tensor)
    if pointer is None:
        # It has no memory, so any buffer that has none will do, but each output needs its own.
        slot = len(buffers) + watched.num_inputs
        buffers[slot] = Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype, 0)
        return Output(slot, None)
    buffer = buffers.get(pointer.slot)
    if buffer is None:
        raise UnrecordableError("it returns an argument")
    if tensor.dtype != buffer.dtype:
        raise UnrecordableError("it returns a view of another dtype")
    size, stride = tuple(tensor.shape), tensor.stride()
    begin, end = memory_range(tensor)
    is_dense = end - begin == tensor.numel() * tensor.itemsize
    if pointer.offset == 0 and is_dense and end - begin == buffer.num_bytes:
        buffers[pointer.slot] = buffer._replace(size=size, stride=stride)
        return Output(pointer.slot, None)
    return Output(pointer.slot, (size, stride, pointer.offset // tensor.itemsize))


def _share(buffers: dict[int, Buffer], kept: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Give the small temporary buffers places in one allocation; return them and its bytes."""
    places, end = [], 0
    for slot, buffer in buffers.items():
        if slot not in kept and buffer.num_bytes <= _SMALL:
            places.append((slot, end))
            end += -(-buffer.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _steps(
    launches: list[Launch],
    buffers: dict[int, Buffer],
    kept: list[int],
    small: list[tuple[int, int]],
) -> list[_Step]:
    """Allocate each buffer before its first launch; free it, if it is temporary, after its last."""
    alone = set(buffers) - {slot for slot, _ in small}
    last = {slot: i for i, launch in enumerate(launches) for slot in launch.slots}
    steps: list[_Step] = []
    made: set[int] = set()
    for i, launch in enumerate(launches):
        new = sorted(launch.slots & alone - made)
        made |= set(new)
        done = [slot for slot in launch.slots & alone if last[slot] == i and slot not in kept]
        steps.append(_Step(tuple((s, buffers[s]) for s in new), launch, tuple(sorted(done))))
    return steps


class Replays:
    """The records of an implementation's calls; the op's kernel asks them first (_core/codegen.py).

    They begin with the op's second call in a process. Its first one loads the implementation.

    Args:
        implementation: what is called, with all arguments of the op.
        driver: what makes launches.

    Attributes:
        records: by what a call depends on beside its tensors' values.
    """

    # Keys that are remembered. A model has tens of them for each number of tokens.
    _MOST_KEPT = 512
    # Calls with one key that are recorded before that is given up.
    _MOST_TRIES = 3
    # While a mode is on, torch keeps flags that threads share: only one may record at a time.
    _recording = threading.Lock()

    def __init__(
        self, implementation: Callable[..., Tensors], driver: Driver | None = None
    ) -> None:
        self.records: dict[Any, Record] = {}
        self._implementation, self._driver = implementation, driver or Cuda()
        # How many calls each key had, up to those of which none could be recorded.
        self._calls: dict[Any, int] = {}
        _all_replays.append(self)

    @property
    def not_recorded(self) -> list[Any]:
        """Return the keys whose calls were watched and could not be recorded."""
        return [key for key, n in self._calls.items() if n > 1 and key not in self.records]

    def forget(self) -> None:
        """Forget all records."""
        # A call that is being recorded keeps the old dictionary, and its record goes with that.
        self._calls = {}
        self.records = {}

    def call(self, key: Any, tensors: tuple[torch.Tensor | None, ...], *args: Any) -> Tensors:
        """Call the implementation; the second call with a key is recorded.

        Args:
            key: what the call depends on.
            tensors: those of the arguments that are tensors, in their order.
            args: all arguments.
        """
        calls, records = self._calls, self.records
        known = records.get(key)
        if known is not None and known.is_stale():
            # Another thread may have seen it too.
            records.pop(key, None)
            calls[key] = 1
        times = calls.get(key, 0)
        if times == 0:
            if len(calls) >= self._MOST_KEPT:
                self.forget()
            self._calls[key] = 1
            return self._implementation(*args)
        is_done = times > self._MOST_TRIES or key in records
        # Of arguments that share memory nobody could tell which one a launch uses.
        if is_done or recorder() is not None or _has_hooks() or share_memory(tensors):
            return self._implementation(*args)
        if not self._recording.acquire(blocking=False):
            return self._implementation(*args)
        try:
            watching = Recorder(tensors, self._driver)
            with watching:
                result = self._implementation(*args)
        finally:
            self._recording.release()
        calls[key] = times + 1
        try:
            records[key] = Record(watching, result, args[0])
        except UnrecordableError as reason:
            name = getattr(self._implementation, "func", self._implementation).__name__
            logger.debug("moe_ops: a call of %s is not replayed: %s", name, reason)
        return result


_all_replays: list[Replays] = []


def forget() -> None:
    """Forget all records: a configuration may have changed."""
    for replays in _all_replays:
        replays.forget()


cache.on_change.append(forget)


def _has_hooks() -> bool:
    """Return whether Triton's launches are watched."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )
