# SPDX-License-Identifier: Apache-2.0
"""Launch compiled Triton kernels through the CUDA driver, without Triton's launcher.

Triton's launcher looks at every argument at every launch, and our kernels have up to 50. Where only
addresses change from one launch to the next, everything else can be packed once. What is left takes
6 to 8 us.

The layout of a kernel's parameters is Triton's, and the driver knows it too. `DirectLaunch`
compares the two. A kernel that does not fit is launched by Triton.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

# From cuda.h. The last two are ids of CUlaunchAttribute and of an entry of `extra`.
_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_TYPES = {
    torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9,
}  # fmt: skip
_FILL_WITH_NAN = 1
_PROMOTE_TO_128_BYTES = 2
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_PARAMETERS, _PARAMETERS_SIZE, _END = 1, 2, 0

# The name of the parameters that Triton appends.
_SCRATCH = ""

# How Triton stores a scalar of each type.
_FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with a value that is one int."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int * 16))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _function(name: str, *argtypes: Any) -> Any:
    """Return a function of the driver, or raise NotImplementedError if it has none of this name."""
    try:
        function = getattr(_driver(), name)
    except (OSError, AttributeError) as error:
        raise NotImplementedError(f"no {name} in the CUDA driver") from error
    function.argtypes = argtypes
    return function


def _check(code: int, what: str) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise RuntimeError(f"moe_ops: {what} failed: {reason} (CUDA error {code})")


class Pointer(NamedTuple):
    """Say where a launch takes an address from.

    Attributes:
        slot: the tensor that it lies in, by a number that the caller understands.
        offset: how many bytes it lies behind that tensor's address.
    """

    slot: int
    offset: int


class TensorMap:
    """Make TMA descriptors (CUtensorMap) that differ in their address only."""

    # All layers of a model share a record, so a weight has as many addresses as there are layers.
    _MOST_KEPT = 1024

    def __init__(self, descriptor: TensorDescriptor, metadata: dict[str, Any]) -> None:
        rank = len(descriptor.shape)
        strides = [stride * descriptor.base.itemsize for stride in descriptor.strides[:-1]]
        self._kept: dict[int, bytes] = {}
        self._encode = _function(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
            *[ctypes.c_void_p] * 4, *[ctypes.c_uint] * 4,
        )  # fmt: skip
        # The driver's order of the dimensions is the reverse of torch's.
        self._arrays = (
            (ctypes.c_uint64 * rank)(*reversed(descriptor.shape)),
            (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides)),
            (ctypes.c_uint32 * rank)(*reversed(metadata["block_size"])),
            (ctypes.c_uint32 * rank)(*[1] * rank),
        )
        self._first = (_TENSOR_MAP_TYPES[descriptor.base.dtype], rank)
        fill = _FILL_WITH_NAN if descriptor.padding == "nan" else 0
        self._last = (0, metadata["swizzle"], _PROMOTE_TO_128_BYTES, fill)
        self._room = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + 64)
        # The driver wants 64-byte alignment.
        self._at = -(-ctypes.addressof(self._room) // 64) * 64

    def at(self, address: int) -> bytes:
        """Return the descriptor of the tensor at this address."""
        found = self._kept.get(address)
        if found is None:
            if len(self._kept) >= self._MOST_KEPT:
                self._kept.clear()
            code = self._encode(self._at, *self._first, address, *self._arrays, *self._last)
            _check(code, "cuTensorMapEncodeTiled")
            found = self._kept[address] = ctypes.string_at(self._at, _TENSOR_MAP_BYTES)
        return found


def why_not_direct(compiled: Any) -> str | None:
    """Return why a compiled kernel cannot be launched directly, or None if it can."""
    metadata = compiled.metadata
    if metadata.target.backend != "cuda":
        return f"it is compiled for {metadata.target.backend}"
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        return "it runs in clusters or as a cooperative grid"
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return "it needs scratch memory"
    descriptors = [t for t in _types(compiled) if t.startswith("tensordesc")]
    described = _descriptors(compiled)
    if len(descriptors) != len(described):
        return "it takes its descriptors apart"
    for meta in described:
        if meta["fp4_padded"] or meta.get("is_im2col", False):
            return "its descriptors are of another kind"
    for kind in _types(compiled):
        if not (kind.startswith(("*", "tensordesc")) or kind in _FORMATS):
            return f"it has a parameter of type {kind}"
    return None


def _descriptors(compiled: Any) -> list[dict[str, Any]]:
    """Return what Triton says of the kernel's descriptors."""
    return getattr(compiled.metadata, "tensordesc_meta", None) or []


def _types(compiled: Any) -> list[str]:
    """Return the types of the parameters; constants are none."""
    return [t for t in compiled.src.signature.values() if t != "constexpr"]


def _pieces(compiled: Any) -> Iterator[tuple[str, str]]:
    """Yield name and type of each piece of memory that the kernel's parameters take, in order.

    A descriptor takes its map, then its shape and its strides as scalars. Triton appends two
    pointers to scratch memory.
    """
    for name, kind in compiled.src.signature.items():
        if kind.startswith("tensordesc"):
            block = re.match(r"tensordesc<[^[>]*\[([^\]]*)\]", kind)
            assert block is not None, kind
            rank = block[1].count(",") + 1
            yield name, "map"
            yield from [(name, "i32")] * rank
            yield from [(name, "i64")] * rank
        elif kind != "constexpr":
            yield name, kind
    yield from [(_SCRATCH, "*")] * 2


def _size(kind: str) -> int:
    if kind == "map":
        return _TENSOR_MAP_BYTES
    return struct.calcsize(_FORMATS.get(kind, "Q"))


def _offsets(compiled: Any) -> list[int] | None:
    """Return where each piece lies, or None if the driver knows another layout."""
    ask = _function(
        "cuFuncGetParamInfo", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
    )
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    pieces, offsets = list(_pieces(compiled)), []
    number = _num_parameters(compiled)
    if number is not None and number != len(pieces):
        return None
    for i, (_, kind) in enumerate(pieces):
        code = ask(compiled.function, i, ctypes.byref(offset), ctypes.byref(size))
        if code != 0 or size.value != _size(kind):
            return None
        offsets.append(offset.value)
    if number is None:
        code = ask(compiled.function, len(pieces), ctypes.byref(offset), ctypes.byref(size))
        return offsets if code != 0 else None
    return offsets


def _num_parameters(compiled: Any) -> int | None:
    """Return how many parameters the kernel has, by its PTX; None where only the binary is kept.

    The driver tells that by an error alone, which compute-sanitizer reports.
    """
    ptx = compiled.asm.get("ptx")
    if ptx is None:
        return None
    _, _, entry = ptx.partition(".entry ")
    return int(entry.partition(")")[0].count(".param "))


class DirectLaunch:
    """Launch one compiled kernel with arguments that differ in their addresses only.

    Args:
        compiled: the kernel, as a launch by Triton returned it; why_not_direct found no reason.
        grid: the number of programs in each dimension.
        values: the arguments by name. A Pointer stands for a tensor, and (Pointer, descriptor) for
            a TensorDescriptor of one.

    Raises:
        NotImplementedError: Triton's layout of the parameters is not the driver's.
    """

    def __init__(self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any]) -> None:
        offsets = _offsets(compiled)
        if offsets is None:
            raise NotImplementedError("its parameters lie otherwise than expected")
        # Keeps the kernel's code loaded.
        self._compiled = compiled
        size = offsets[-1] + 8
        self._memory = ctypes.create_string_buffer(size)
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._bytes = memoryview(self._memory).cast("B")
        self._pointers: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int, TensorMap]] = []
        self._pack(offsets, values)
        metadata = compiled.metadata
        grid = (*grid, 1, 1)[:3]
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
        self._config = _LaunchConfig(
            grid, (32 * metadata.num_warps, 1, 1), metadata.shared, None,
            ctypes.addressof(self._attribute), int(metadata.launch_pdl),
        )  # fmt: skip
        self._is_empty = 0 in grid
        self._size = ctypes.c_size_t(size)
        self._extra = (ctypes.c_void_p * 5)(
            _PARAMETERS, ctypes.addressof(self._memory),
            _PARAMETERS_SIZE, ctypes.addressof(self._size), _END,
        )  # fmt: skip
        self._launch = _function("cuLaunchKernelEx", *[ctypes.c_void_p] * 4)
        self._arguments = (
            ctypes.addressof(self._config), compiled.function, None, ctypes.addressof(self._extra),
        )  # fmt: skip
        self._stream = 0

    def _pack(self, offsets: list[int], values: dict[str, Any]) -> None:
        """Write the constants, and note where addresses and descriptors go."""
        maps = iter(_descriptors(self._compiled))
        waiting: list[int] = []
        for (name, kind), offset in zip(_pieces(self._compiled), offsets, strict=True):
            if name == _SCRATCH:
                continue
            value = values[name]
            if kind == "map":
                pointer, descriptor = value
                made = TensorMap(descriptor, next(maps))
                self._maps.append((offset, pointer.slot, pointer.offset, made))
                waiting = [*descriptor.shape, *descriptor.strides]
            elif waiting:
                self._pack_scalar(kind, offset, waiting.pop(0))
            elif isinstance(value, Pointer):
                self._pointers.append((offset // 8, *value))
            elif value is not None:
                self._pack_scalar(kind, offset, value)
            elif not kind.startswith("*"):
                raise NotImplementedError(f"its argument {name} has no value")

    def _pack_scalar(self, kind: str, offset: int, value: float) -> None:
        try:
            struct.pack_into(_FORMATS[kind], self._memory, offset, value)
        except (struct.error, OverflowError) as error:
            raise NotImplementedError(f"{value} does not fit its type {kind}") from error

    @property
    def slots(self) -> set[int]:
        """Return the slots that the launch reads or writes."""
        return {p[1] for p in self._pointers} | {m[1] for m in self._maps}

    def __call__(self, addresses: list[int], stream: int) -> None:
        """Launch the kernel; addresses[slot] is where the slot's tensor lies now."""
        if self._is_empty:
            return
        words = self._words
        for word, slot, offset in self._pointers:
            words[word] = addresses[slot] + offset
        for where, slot, offset, made in self._maps:
            self._bytes[where : where + _TENSOR_MAP_BYTES] = made.at(addresses[slot] + offset)
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code = self._launch(*self._arguments)
        if code != 0:
            _check(code, f"the launch of {self._compiled.metadata.name}")


class DirectZero:
    """Zero some bytes.

    Args:
        pointer: where they begin.
        size: how many they are.
    """

    def __init__(self, pointer: Pointer, size: int) -> None:
        self._pointer, self._size = pointer, size
        self._set = _function(
            "cuMemsetD8Async", ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p
        )

    @property
    def slots(self) -> set[int]:
        """Return the slot that is written."""
        return {self._pointer.slot}

    def __call__(self, addresses: list[int], stream: int) -> None:
        """Zero the bytes; addresses[slot] is where the slot's tensor lies now."""
        slot, offset = self._pointer
        if self._size > 0:
            code = self._set(addresses[slot] + offset, 0, self._size, stream)
            _check(code, "cuMemsetD8Async")


class Cuda:
    """Make launches for a device, and tell where they go."""

    def __init__(self) -> None:
        self._threads = threading.local()

    def launch(self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any]) -> DirectLaunch:
        """Make a launch; DirectLaunch tells the arguments.

        Raises:
            NotImplementedError: the kernel cannot be launched directly.
        """
        if (reason := why_not_direct(compiled)) is not None:
            raise NotImplementedError(reason)
        return DirectLaunch(compiled, grid, values)

    def zero(self, pointer: Pointer, size: int) -> DirectZero:
        """Make what zeros `size` bytes."""
        return DirectZero(pointer, size)

    def is_current(self, index: int) -> bool:
        """Return whether the device is the thread's current one."""
        return torch.cuda.current_device() == index

    def stream(self, index: int) -> int:
        """Return the device's current stream; the device must be the current one."""
        if getattr(self._threads, "bound", None) != index:
            self._bind(index)
        stream: int = driver.active.get_current_stream(index)
        return stream

    def _bind(self, index: int) -> None:
        """Give this thread a CUDA context: one of autograd's may have none yet."""
        context = ctypes.c_void_p()
        _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context.value:
            retain = _driver().cuDevicePrimaryCtxRetain
            _check(retain(ctypes.byref(context), ctypes.c_int(index)), "cuDevicePrimaryCtxRetain")
            _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")
        self._threads.bound = index
