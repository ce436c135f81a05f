# SPDX-License-Identifier: Apache-2.0
"""Descriptors and launches of direct.py, on the CPU: a stand-in does what the CUDA driver does.

tests/gpu/test_replay.py compares with Triton's launches on CUDA.
"""

import ctypes
import gc
import os
import struct
import weakref
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels, not TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from moe_ops._triton import direct
from moe_ops._triton.descriptors import describe
from moe_ops._triton.direct import Cuda, DirectLaunch, Pointer, TensorMap
from moe_ops._triton.recorder import recorder
from moe_ops._triton.replay import Replays

BLOCK = (2, 4)
METADATA = {"block_size": list(BLOCK), "swizzle": 0, "fp4_padded": False}
# What the kernel below takes: bytes of each piece, as the driver tells them. The last two are
# pointers to scratch memory.
PIECES = (128, 4, 4, 8, 8, 8, 4, 4, 8, 8)


class DescribedAddKernel:
    """A stand-in for a compiled kernel: output = described rows + number, over fp32."""

    __name__ = "described_add_kernel"
    arg_names = ("input_desc", "output_ptr", "size", "number")
    pieces = PIECES
    keeps_ptx = True
    metadata = SimpleNamespace(
        target=SimpleNamespace(backend="cuda"), num_ctas=1, launch_cooperative_grid=False,
        global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=[METADATA], num_warps=4,
        shared=0, launch_pdl=False, name="described_add_kernel",
    )  # fmt: skip
    src = SimpleNamespace(
        signature={
            "input_desc": "tensordesc<fp32[2, 4]>", "output_ptr": "*fp32", "size": "i32",
            "number": "fp32", "BLOCK": "constexpr",
        }
    )  # fmt: skip
    function = 7

    @property
    def asm(self):
        if not self.keeps_ptx:
            return {}
        parameters = ",\n".join(f".param .b8 p[{size}]" for size in self.pieces)
        return {"ptx": f".func g(.param .b32 p)\n.visible .entry f(\n{parameters}\n) {{}}"}


class Driver:
    """Does what the CUDA driver's functions do. A map is the numbers that it was made from."""

    def __init__(self):
        # The address, the sizes and the strides of each map that was made.
        self.encoded = []
        self.error = 0

    def function(self, name, *argtypes):
        return getattr(self, name)

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, target, dtype, rank, address, sizes, strides, box, steps, *modes
    ):
        assert target % 64 == 0
        assert (dtype, list(box), list(steps)) == (7, [*reversed(BLOCK)], [1] * rank)
        made = (address, tuple(sizes), tuple(strides))
        self.encoded.append(made)
        packed = struct.pack("<4Q", address, *sizes, *strides)
        ctypes.memmove(target, packed.ljust(128, b"\0"), 128)
        return self.error

    def cuFuncGetParamInfo(self, function, index, offset, size):  # noqa: N802
        pieces = DescribedAddKernel.pieces
        if index >= len(pieces):
            assert not DescribedAddKernel.keeps_ptx, "the driver takes this for an error"
            return 1
        at = 0
        for i, piece in enumerate(pieces[: index + 1]):
            at = -(-at // min(piece, 64)) * min(piece, 64)
            if i < index:
                at += piece
        offset._obj.value, size._obj.value = at, pieces[index]
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):  # noqa: N802
        assert (function, parameters) == (DescribedAddKernel.function, None)
        begin = (ctypes.c_uint64 * 5).from_address(extra)[1]
        packed = ctypes.string_at(begin, 128 + 4 * 2 + 8 * 2 + 8 + 4 + 4)
        address, columns, rows, row_bytes = struct.unpack_from("<4Q", packed)
        *shape, _, _, output, size, number = struct.unpack_from("<2i2qQif", packed, 128)
        assert shape == [rows, columns]
        target = (ctypes.c_float * size).from_address(output)
        for i in range(size):
            row, column = divmod(i, columns)
            value = ctypes.c_float.from_address(address + row * row_bytes + 4 * column).value
            target[i] = value + number
        return 0


class CudaOnHost(Cuda):
    def is_current(self, index):
        return True

    def stream(self, index):
        return 0


@pytest.fixture
def cuda(monkeypatch):
    found = Driver()
    monkeypatch.setattr(direct, "_function", found.function)
    return found


def tensor_map(tensor):
    return TensorMap(describe(tensor, BLOCK), METADATA)


def add_described(input, number):
    """Return input + number, by the kernel above, where a call is recorded; else by torch."""
    watching = recorder()
    if watching is None:
        return input + number
    output = torch.empty(input.shape)
    kernel, described = DescribedAddKernel(), describe(input, BLOCK)
    watching.launched(kernel, kernel, (1,), (described, output, input.numel(), number))
    return output


class Called:
    """The same behind Replays, called as the op's generated kernel calls it."""

    def __init__(self):
        self.replays = Replays(add_described, CudaOnHost())

    def __call__(self, input, number):
        key = (input.shape, input.stride(), number)
        record = self.replays.records.get(key)
        if record is not None:
            return record(input.data_ptr())
        return self.replays.call(key, (input,), input, number)


def test_a_map_is_made_once_for_an_address(cuda):
    one, other = torch.zeros(6, 8), torch.zeros(6, 8)
    made = tensor_map(one)
    first = made.at(one.data_ptr())
    assert made.at(other.data_ptr()) != first
    for _ in range(3):
        assert made.at(one.data_ptr()) == first
        made.at(other.data_ptr())
    # The driver counts the dimensions from the last, and strides in bytes.
    assert cuda.encoded == [(t.data_ptr(), (8, 6), (32,)) for t in (one, other)]


def test_tensors_of_another_shape_or_strides_have_their_own_maps(cuda):
    """All four lie at one address."""
    room = torch.zeros(6 * 16)
    tensors = [
        room[:48].view(6, 8), room[:48].view(12, 4), room.view(6, 16)[:, :8], room[:32].view(4, 8),
    ]  # fmt: skip
    (address,) = {t.data_ptr() for t in tensors}
    maps = [tensor_map(t) for t in tensors]
    found = [made.at(address) for made in maps]
    assert [made.at(address) for made in maps] == found
    assert len(set(found)) == 4
    assert cuda.encoded == [
        (address, (8, 6), (32,)), (address, (4, 12), (16,)), (address, (8, 6), (64,)),
        (address, (8, 4), (32,)),
    ]  # fmt: skip


def test_the_stride_of_a_single_row_is_one_that_tma_takes(cuda):
    """Torch gives a dimension of size 1 any stride."""
    tensor = torch.zeros(8).as_strided((1, 8), (7, 1))
    tensor_map(tensor).at(tensor.data_ptr())
    assert cuda.encoded == [(tensor.data_ptr(), (8, 1), (32,))]


def test_a_map_holds_no_tensor(cuda):
    tensor = torch.zeros(6, 8)
    gone = weakref.ref(tensor)
    made = tensor_map(tensor)
    made.at(tensor.data_ptr())
    del tensor
    gc.collect()
    assert gone() is None


def test_maps_that_are_kept_are_bounded(cuda):
    tensor = torch.zeros(6, 8)
    made, most = tensor_map(tensor), TensorMap._MOST_KEPT
    assert most == 1024
    found = [made.at(64 * i) for i in range(1, most + 1)]
    assert [made.at(64 * i) for i in range(1, most + 1)] == found
    assert len(cuda.encoded) == len(made._kept) == most
    # One more. All others are made again when they are asked for, and are the same.
    made.at(64 * (most + 1))
    assert len(made._kept) <= most
    assert [made.at(64 * i) for i in range(1, most + 1)] == found
    assert len(made._kept) <= most
    assert most + 2 <= len(cuda.encoded) <= 2 * most + 2


def test_a_map_that_the_driver_refuses_is_not_kept(cuda, monkeypatch):
    names = SimpleNamespace(cuGetErrorString=lambda code, text: 1)
    monkeypatch.setattr(direct, "_driver", lambda: names)
    tensor = torch.zeros(6, 8)
    made, cuda.error = tensor_map(tensor), 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled"):
            made.at(tensor.data_ptr())
    cuda.error = 0
    made.at(tensor.data_ptr())
    assert len(cuda.encoded) == 3


def test_a_record_with_descriptors_holds_no_tensor(cuda):
    called = Called()
    gone = []
    for _ in range(5):
        x = torch.randn(6, 8)
        output = called(x, 1.0)
        gone += [weakref.ref(x), weakref.ref(output)]
    assert len(called.replays.records) == 1
    torch.testing.assert_close(output, x + 1)
    del x, output
    gc.collect()
    assert not any(reference() is not None for reference in gone)


def test_a_replay_describes_the_tensors_that_it_gets(cuda):
    called, kept = Called(), []
    for turn in range(8):
        x = torch.randn(6, 8)
        output = called(x, 1.5)
        kept.append(x)
        if turn != 1:  # the call that is recorded computes nothing here
            torch.testing.assert_close(output, x + 1.5)
    replayed = [x.data_ptr() for x in kept[2:]]
    assert [address for address, *_ in cuda.encoded] == replayed
    # Those that come again are described already.
    for x in kept[2:]:
        torch.testing.assert_close(called(x, 1.5), x + 1.5)
    assert len(cuda.encoded) == len(replayed)


def test_another_tensor_at_the_address_of_one_that_is_gone(cuda):
    """It has other shapes, then other strides, then what the first one had."""
    called, room = Called(), torch.empty(6 * 16)
    views = [
        lambda: room[:48].view(6, 8), lambda: room[:48].view(12, 4), lambda: room[:32].view(4, 8),
        lambda: room.view(6, 16)[:, :8], lambda: room[:48].view(6, 8),
    ]  # fmt: skip
    for place, view in enumerate(views):
        for turn in range(4):
            room.normal_()
            output = called(view(), 1.0)
            if turn > 1 or place == 4:
                torch.testing.assert_close(output, view() + 1)
    assert len(called.replays.records) == 4
    assert [what for _, *what in cuda.encoded] == [
        [(8, 6), (32,)], [(4, 12), (16,)], [(8, 4), (32,)], [(8, 6), (64,)],
    ]  # fmt: skip
    assert {address for address, *_ in cuda.encoded} == {room.data_ptr()}


@pytest.mark.parametrize(
    "pieces", [PIECES[:-1], (*PIECES, 8), (64, *PIECES[1:]), (*PIECES[:6], 8, *PIECES[7:])]
)
@pytest.mark.parametrize("keeps_ptx", [True, False])
def test_another_layout_of_the_parameters_is_not_launched(cuda, monkeypatch, pieces, keeps_ptx):
    """Such as that of another Triton: one piece less, one more, and two of other sizes."""
    monkeypatch.setattr(DescribedAddKernel, "keeps_ptx", keeps_ptx)
    monkeypatch.setattr(DescribedAddKernel, "pieces", pieces)
    values = {
        "input_desc": (Pointer(0, 0), describe(torch.zeros(6, 8), BLOCK)),
        "output_ptr": Pointer(1, 0), "size": 48, "number": 1.0,
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match="lie otherwise"):
        DirectLaunch(DescribedAddKernel(), (1,), values)
