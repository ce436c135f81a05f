# SPDX-License-Identifier: Apache-2.0
"""Records of calls, on the CPU: a stand-in driver does with memory what its kernels do with tensors.

tests/gpu/test_replay.py tests the same on CUDA, with the CUDA driver.
"""

import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from triton import knobs

from moe_ops._core import codegen
from moe_ops._core.library import SCHEMAS
from moe_ops._triton import replay
from moe_ops._triton.launch import launch
from moe_ops._triton.recorder import recorder
from moe_ops._triton.replay import Replays


class AddKernel:
    """A stand-in for a Triton kernel: output = input + number, over fp32."""

    __name__ = "add_kernel"
    arg_names = ("input_ptr", "output_ptr", "size", "number")

    def __getitem__(self, grid):
        def run(input, output, size, number):
            output.view(-1)[:size] = input.reshape(-1)[:size] + number
            return self

        return run


add_kernel = AddKernel()


class AddLaunch:
    """The same on bare memory."""

    def __init__(self, values):
        self.values = values
        self.slots = {values["input_ptr"].slot, values["output_ptr"].slot}

    def __call__(self, addresses, stream):
        def memory(pointer):
            room = ctypes.c_float * self.values["size"]
            return room.from_address(addresses[pointer.slot] + pointer.offset)

        source, target = memory(self.values["input_ptr"]), memory(self.values["output_ptr"])
        for i, value in enumerate(source):
            target[i] = value + self.values["number"]


class ZeroBytes:
    def __init__(self, pointer, size):
        self.pointer, self.size = pointer, size
        self.slots = {pointer.slot}

    def __call__(self, addresses, stream):
        ctypes.memset(addresses[self.pointer.slot] + self.pointer.offset, 0, self.size)


class HostDriver:
    """Makes launches that work on the CPU's memory."""

    def launch(self, compiled, grid, values):
        return AddLaunch(values)

    def zero(self, pointer, size):
        return ZeroBytes(pointer, size)

    def is_current(self, index):
        return True

    def stream(self, index):
        return 0


def add(input, number, output):
    # What the stand-in kernel does is an op of torch, which a recorder would see.
    watching = recorder()
    if watching is None:
        launch(add_kernel, (1,), input, output, input.numel(), number, on=input)
    else:
        watching.launched(add_kernel, add_kernel, (1,), (input, output, input.numel(), number))


class Called:
    """An implementation behind Replays, called as the op's generated kernel calls it."""

    def __init__(self, implementation):
        self.times = 0

        def counted(*args):
            self.times += 1
            return implementation(*args)

        self.replays = Replays(counted, HostDriver())

    def __call__(self, *args):
        tensors = tuple(a for a in args if a is None or isinstance(a, torch.Tensor))
        key = tuple(
            (a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args
        )
        record = self.replays.records.get(key)
        if record is not None:
            found = record(*(0 if t is None else t.data_ptr() for t in tensors))
            if found is not None:
                return found
        return self.replays.call(key, tensors, *args)


def twice_plus(input, number):
    """Return input + 2 * number: by way of a temporary tensor."""
    between = torch.empty_like(input)
    output = input.new_empty(input.shape)
    add(input, number, between)
    add(between, number, output)
    return output


def test_a_third_call_replays_with_other_tensors():
    called = Called(twice_plus)
    kept = []
    for turn in range(6):
        x = torch.randn(3, 4)
        output = called(x, 1.5)
        if turn != 1:  # while a call is recorded, the stand-in kernel computes nothing
            torch.testing.assert_close(output, x + 3)
        kept.append((x, output, output.clone()))
    assert called.times == 2
    for _, output, copy in kept[2:]:
        assert torch.equal(output, copy)


def test_another_number_is_another_record():
    called = Called(twice_plus)
    x = torch.randn(8)
    for number in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        output = called(x, number)
    torch.testing.assert_close(output, x + 4)
    torch.testing.assert_close(called(x, 1.0), x + 2)
    assert called.times == 4


def test_a_record_holds_no_tensor():
    called = Called(twice_plus)
    gone = []
    for _ in range(4):
        x = torch.randn(5)
        output = called(x, 1.0)
        gone += [weakref.ref(x), weakref.ref(output)]
    del x, output
    gc.collect()
    assert not any(reference() is not None for reference in gone)


def test_outputs_are_new_tensors():
    def both(input):
        first, second = torch.empty_like(input), torch.empty_like(input)
        add(input, 1.0, first)
        add(input, 2.0, second)
        return first, second, input.new_empty(0)

    called = Called(both)
    x = torch.randn(4)
    calls = [called(x) for _ in range(4)]
    tensors = [t for outputs in calls[2:] for t in outputs[:2]]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.storage_offset() == 0 for t in tensors)
    assert all(t.untyped_storage().nbytes() == 16 for t in tensors)
    assert calls[3][2].shape == (0,)
    torch.testing.assert_close(calls[3][1], x + 2)


def test_views_are_returned_as_views():
    def halves(input):
        made = input.new_empty(2, input.shape[0])
        add(input, 1.0, made[0])
        add(input, 2.0, made[1])
        return made.transpose(0, 1)

    called = Called(halves)
    x = torch.randn(4)
    for _ in range(4):
        output = called(x)
    assert output.shape == (4, 2)
    assert output.stride() == (1, 4)
    torch.testing.assert_close(output, torch.stack([x + 1, x + 2], 1))


def test_a_part_of_a_tensor_is_returned():
    def tail(input):
        made = input.new_empty(2 * input.shape[0])
        add(input, 1.0, made)
        add(input, 5.0, made[input.shape[0] :])
        return made[input.shape[0] :]

    called = Called(tail)
    x = torch.randn(4)
    for _ in range(4):
        output = called(x)
    torch.testing.assert_close(output, x + 5)


def test_zeros_are_zeroed_again():
    def some_zeros(input):
        made = input.new_zeros(2 * input.shape[0])
        add(input, 1.0, made)
        return made

    called = Called(some_zeros)
    x = torch.randn(4)
    for _ in range(4):
        output = called(x)
        if called.times > 1:
            continue
        torch.testing.assert_close(output, torch.cat([x + 1, torch.zeros(4)]))
    torch.testing.assert_close(called(x), torch.cat([x + 1, torch.zeros(4)]))


def test_a_missing_tensor_stays_missing():
    def either(input, other):
        output = torch.empty_like(input)
        add(input if other is None else other, 1.0, output)
        return output

    called = Called(either)
    x, y = torch.randn(4), torch.randn(4)
    for _ in range(4):
        without, given = called(x, None), called(x, y)
    torch.testing.assert_close(without, x + 1)
    torch.testing.assert_close(given, y + 1)
    assert called.times == 4


def returns_an_argument(input, other):
    return input


def computes(input, other):
    return input * 2


def reads_a_value(input, other):
    output = torch.empty_like(input)
    if input.new_empty(1).numel() == 1 and float(input[0]) == float(input[0]):
        add(input, 1.0, output)
    return output


def shares(input, other):
    made = input.new_empty(2, 4)
    add(input, 1.0, made)
    return made[0], made[1]


def writes(input, other):
    output = torch.empty_like(input)
    output.fill_(1)
    return output


def copies(input, other):
    return other.t().contiguous()


def computes_nothing(input, other):
    """A collective of nothing is a collective: on other ranks it may hold something."""
    return torch.clone(input[:0])


@pytest.mark.parametrize(
    "implementation",
    [returns_an_argument, computes, computes_nothing, reads_a_value, shares, writes, copies],
)
def test_what_cannot_be_recorded_is_called(implementation):
    called = Called(implementation)
    x, other = torch.randn(4), torch.randn(3, 2)
    for _ in range(4):
        called(x, other)
    assert called.times == 4
    assert not called.replays.records


class Failing(HostDriver):
    """A driver that lacks something."""

    def __init__(self, error):
        self.error = error

    def launch(self, compiled, grid, values):
        raise self.error

    def zero(self, pointer, size):
        raise TypeError


@pytest.mark.parametrize("error", [KeyError("block"), AttributeError("x"), NotImplementedError()])
def test_a_driver_that_fails_never_fails_a_call(error):
    def zeros_and_add(input):
        output = input.new_zeros(input.shape)
        add(input, 1.0, output)
        return output

    for implementation in (zeros_and_add, lambda input: twice_plus(input, 0.5)):
        called = Called(implementation)
        called.replays._driver = Failing(error)
        for _ in range(6):
            called(torch.randn(4))
        assert called.times == 6
        assert len(called.replays.not_recorded) == 1


def test_a_call_that_fails_is_recorded_when_it_works():
    memory = [True, False, True, True, True]

    def add_with_luck(input):
        if not memory[called.times - 1]:
            raise torch.OutOfMemoryError("no memory")
        return twice_plus(input, 0.5)

    called = Called(add_with_luck)
    x = torch.randn(4)
    called(x)
    with pytest.raises(torch.OutOfMemoryError):
        called(x)
    assert recorder() is None
    for _ in range(3):
        output = called(x)
    assert called.times == 3
    torch.testing.assert_close(output, x + 1)


def test_an_expanded_output_is_not_taken_for_its_memory():
    def expanded(input):
        made = input.new_empty(4)
        add(input, 1.0, made)
        return made[:2].unsqueeze(1).expand(2, 2)

    called = Called(expanded)
    x = torch.randn(4)
    for _ in range(4):
        output = called(x)
    assert output.stride() == (1, 0)
    torch.testing.assert_close(output, (x[:2] + 1).unsqueeze(1).expand(2, 2))


def test_a_meta_tensor_is_no_memory():
    def with_meta(input):
        torch.empty_strided((2**62,), (1,), dtype=torch.uint8, device="meta")
        return twice_plus(input, 0.5)

    called = Called(with_meta)
    x = torch.randn(4)
    for _ in range(4):
        output = called(x)
    assert called.times == 2
    torch.testing.assert_close(output, x + 1)


def test_recording_does_not_import_dynamo():
    script = """
import sys
import torch
from moe_ops._triton.recorder import Recorder
with Recorder([torch.ones(3)], driver=None) as watching:
    torch.empty(3).view(3, 1)
assert watching.obstacle is None and len(watching.buffers) == 1
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_arguments_that_share_memory_are_not_recorded():
    def sums(input, other):
        output = torch.empty_like(input)
        add(other, 1.0, output)
        return output

    called = Called(sums)
    x = torch.randn(4)
    for _ in range(5):
        called(x, x)
    assert called.times == 5
    # Others with the same key are.
    for _ in range(3):
        output = called(x, x + 1)
    assert called.times == 6
    torch.testing.assert_close(output, x + 2)
    # Then even those that share memory are replayed: a record knows which argument it reads.
    torch.testing.assert_close(called(x, x), x + 1)
    assert called.times == 6
    # Apart in one storage is apart.
    called, both = Called(sums), torch.randn(8)
    for _ in range(4):
        output = called(both[:4], both[4:])
    assert called.times == 2
    torch.testing.assert_close(output, both[4:] + 1)


@pytest.mark.parametrize("when", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_see_every_call(when):
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(3):
        called(x, 1.0)
    assert called.times == 2

    def hook(metadata):
        pass

    hooks = getattr(knobs.runtime, when)
    hooks.add(hook)
    try:
        called(x, 1.0)
    finally:
        hooks.remove(hook)
    assert called.times == 3
    called(x, 1.0)
    assert called.times == 3


def test_a_busy_record_is_not_waited_for():
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(2):
        called(x, 1.0)
    (record,) = called.replays.records.values()
    outputs = []
    with record._lock:
        thread = threading.Thread(target=lambda: outputs.append(called(x, 1.0)))
        thread.start()
        thread.join()
    assert called.times == 3
    torch.testing.assert_close(outputs[0], x + 2)


def test_a_changed_precision_is_not_replayed():
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(3):
        called(x, 1.0)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        for _ in range(3):
            called(x, 1.0)
        assert called.times == 3
    finally:
        matmul.fp32_precision = before
    called(x, 1.0)
    assert called.times == 4


def test_a_record_that_another_thread_forgets_meanwhile(monkeypatch):
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(3):
        called(x, 1.0)
    ((key, record),) = called.replays.records.items()

    def is_stale():
        called.replays.records.pop(key, None)
        return True

    monkeypatch.setattr(record, "is_stale", is_stale)
    called.replays.call(key, (x,), x, 1.0)  # is recorded again
    torch.testing.assert_close(called(x, 1.0), x + 2)
    assert called.times == 3


def test_a_changed_table_forgets_the_records():
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(3):
        called(x, 1.0)
    replay.forget()
    called(x, 1.0)
    assert called.times == 3


def test_what_is_recorded_while_records_are_forgotten_is_not_kept():
    factor = [1.0]

    def add_factor(input):
        output = torch.empty_like(input)
        add(input, factor[0], output)
        if called.times == 2:
            factor[0] = 2.0
            replay.forget()
        return output

    called = Called(add_factor)
    x = torch.randn(4)
    for _ in range(5):
        output = called(x)
    torch.testing.assert_close(output, x + 2)


def test_many_keys_are_bounded(monkeypatch):
    monkeypatch.setattr(Replays, "_MOST_KEPT", 4)
    called = Called(twice_plus)
    x = torch.randn(4)
    for number in range(20):
        for _ in range(3):
            output = called(x, float(number))
        assert len(called.replays.records) <= 4
    torch.testing.assert_close(output, x + 38)


def test_a_large_temporary_is_freed_behind_its_last_launch(monkeypatch):
    monkeypatch.setattr(replay, "_SMALL", 0)
    called = Called(twice_plus)
    x = torch.randn(4)
    for _ in range(2):
        called(x, 1.0)
    (record,) = called.replays.records.values()
    assert [len(step.allocate) for step in record._steps] == [1, 1]
    assert [len(step.free) for step in record._steps] == [0, 1]
    torch.testing.assert_close(called(x, 1.0), x + 2)


def test_the_generated_kernel_asks_for_records_first():
    generated = codegen.generate(SCHEMAS["unpermute"])
    calls = []

    class Fake:
        """Records everything, and replays it as the sum of addresses."""

        def __init__(self):
            self.records = {}

        def call(self, key, tensors, *args):
            calls.append((key, tensors, args))
            self.records[key] = lambda *addresses: addresses
            return "called"

    fake = Fake()
    kernel = generated.kernel_of(lambda: (lambda *args: "first", fake), False)
    x, gather = torch.randn(4, 2), torch.arange(4)
    assert kernel(x, gather) == "first"
    assert kernel(x, gather) == "called"
    assert kernel(x, gather) == (x.data_ptr(), gather.data_ptr(), 0, 0)
    _, tensors, args = calls[0]
    assert tensors == (x, gather, None, None)
    assert args == (x, gather, None, 1, None)
    # Whatever a launch may follow from is another key.
    others = (
        (x[:2], gather[:2]),
        (x.t().contiguous().t(), gather),
        (x.double(), gather),
        (torch.randn(9)[1:].view(4, 2), gather),
        (x, gather.int()),
        (x, gather, torch.ones(4, 1)),
        (x, gather, None, 2),
    )
    for args in others:
        assert kernel(*args) == "called", args
    # A call with a key that was recorded is still checked where it could differ.
    with pytest.raises(TypeError, match="input"):
        kernel(None, gather)
