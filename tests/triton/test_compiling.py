# SPDX-License-Identifier: Apache-2.0
"""The kernels of a first call compile beside each other, before the first of them is launched."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ops._triton import compiling
from moe_ops._triton.compiling import compiled_together
from moe_ops._triton.launch import launch
from testing.compiled import GPUS, compiling_for

X = torch.empty(4)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Take the arguments of a call for those of one that launches."""
    monkeypatch.setattr(compiling, "_launches", lambda args: True)


class Kernel:
    """A stand-in for a Triton kernel: it notes what is done with it."""

    def __init__(self, name, events):
        self.__name__, self.events = name, events

    def warmup(self, *args, grid, **options):
        self.events.append(f"compile {self.__name__}")

    def __getitem__(self, grid):
        return lambda *args, **options: self.events.append(f"launch {self.__name__}")


def two_kernels(events):
    first, second = Kernel("first", events), Kernel("second", events)

    @compiled_together
    def implementation(x, *, for_backward=False):
        launch(first, (1,), x, on=x)
        y = x.new_zeros(2)
        launch(second, (1,), y, on=y)
        return y

    return implementation


def test_a_first_call_compiles_all_before_it_launches_any():
    events: list[str] = []
    implementation = two_kernels(events)
    assert implementation(X).tolist() == [0, 0]
    both = ["compile first", "compile second", "launch first", "launch second"]
    assert events == both
    implementation(X)
    assert events[4:] == ["launch first", "launch second"]
    # It launches other kernels where it keeps something for a backward.
    implementation(X, for_backward=True)
    assert events[6:] == both


def test_a_call_that_is_captured_or_of_meta_tensors_is_made_once(monkeypatch):
    monkeypatch.undo()
    events: list[str] = []
    two_kernels(events)(X)
    assert events == ["launch first", "launch second"]


def test_a_call_without_tokens_is_no_first_call(monkeypatch):
    """It launches next to nothing, and would leave the next call to compile its kernels one by one."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        some, none = (torch.empty(rows, 4, device="cuda") for rows in (3, 0))
    assert compiling._launches((some,))
    assert not compiling._launches((none,))
    assert not compiling._launches((torch.empty(3, 4, device="meta"),))


def test_an_error_of_the_implementation_comes_through():
    @compiled_together
    def implementation(x):
        raise ValueError("wrong")

    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            implementation(X)
        assert not compiling.is_ahead()


def test_where_somebody_compiles_ahead_already_it_does_not():
    events: list[str] = []
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        two_kernels(events)(X)
    assert events == ["launch first", "launch second"]


def forward_and_backward(events, fails=False):
    """A forward of one kernel, compiled with a backward that has another."""

    @compiled_together
    def backward(gradient):
        launch(Kernel("backward", events), (1,), gradient, on=gradient)

    @compiled_together
    def forward(x):
        launch(Kernel("forward", events), (1,), x, on=x)
        return x

    def through(args, called):
        backward(called(*args))
        if fails:
            raise NotImplementedError

    return compiling.compiled_with_backward(forward, through), backward


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_compiles_its_backward_beside_it(fails):
    """What is wrong with the backward does not concern the forward."""
    events: list[str] = []
    forward, backward = forward_and_backward(events, fails)
    assert forward(X) is X
    # The forward's own first call goes through it as well, and Triton finds its kernels.
    assert events == ["compile forward", "compile backward", "compile forward", "launch forward"]
    forward(X)
    # A backward may need other gradients than the rehearsal did.
    backward(X)
    backward(X)
    assert events[4:] == [
        "launch forward", "compile backward", "launch backward", "launch backward",
    ]  # fmt: skip
    assert not compiling.is_ahead()


def test_a_forward_that_is_captured_leaves_its_backward_alone(monkeypatch):
    events: list[str] = []
    forward, backward = forward_and_backward(events)
    with monkeypatch.context() as during:
        during.setattr(compiling, "_launches", lambda args: False)
        forward(X)
    assert events == ["launch forward"]
    backward(X)
    assert events[1:] == ["compile backward", "launch backward"]


def test_other_threads_go_on_launching():
    events: list[str] = []
    elsewhere: list[str] = []
    inner = Kernel("elsewhere", elsewhere)

    @compiled_together
    def implementation(x):
        thread = threading.Thread(target=launch, args=(inner, (1,), x), kwargs={"on": x})
        thread.start()
        thread.join()
        launch(Kernel("own", events), (1,), x, on=x)

    implementation(X)
    assert events == ["compile own", "launch own"]
    assert elsewhere == ["launch elsewhere"] * 2


class Compiled:
    """A stand-in for a compiled kernel: it notes in which thread and on which device it is loaded."""

    def __init__(self, loaded, fails=False):
        self.loaded, self.fails = loaded, fails

    @property
    def run(self):
        if self.fails:
            raise triton.OutOfResources(3, 2, "shared memory")
        self.loaded.append((threading.current_thread(), DEVICES[-1]))


DEVICES: list[torch.device] = []


@contextlib.contextmanager
def current(device):
    DEVICES.append(device)
    yield
    DEVICES.pop()


def test_a_kernel_is_loaded_where_it_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", current)
    loaded: list[tuple[threading.Thread, torch.device]] = []
    kernel, device = Compiled(loaded), torch.device("cuda", 1)
    with compiling._Compilers(device) as executor:
        assert executor.submit(lambda: kernel).result() is kernel
        fails = executor.submit(lambda: Compiled(loaded, fails=True))
        assert isinstance(fails.exception(), triton.OutOfResources)
    ((thread, on),) = loaded
    assert thread is not threading.main_thread()
    assert on == device
    with compiling._Compilers(torch.device("meta")) as executor:
        executor.submit(lambda: kernel).result()
    assert len(loaded) == 1


@triton.jit
def _store_kernel(x_ptr, VALUE: tl.constexpr):
    tl.store(x_ptr, VALUE)


def test_triton_compiles_in_threads_what_is_launched_after(monkeypatch):
    """Each kernel is compiled once, and none by the thread that calls."""
    compilers: list[threading.Thread] = []
    own = triton.compiler.compile

    def noted(*args, **kwargs):
        compilers.append(threading.current_thread())
        return own(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", noted)

    @compiled_together
    def implementation(x):
        for value in (1, 2, 3):
            launch(_store_kernel, (1,), x, value, on=x)

    with compiling_for(GPUS["sm_90"]) as found:
        implementation(torch.empty(4, device="meta"))
    assert len(found) == 6
    assert len(compilers) == 3
    assert threading.main_thread() not in compilers
