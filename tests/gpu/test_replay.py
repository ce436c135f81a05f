# SPDX-License-Identifier: Apache-2.0
"""Calls that are replayed through the CUDA driver: they do what Triton's launches did.

The second call with the same sizes is recorded and the third is the first that replays
(src/moe_ops/_triton/replay.py).
"""

import ctypes
import threading

import pytest
import torch
from triton import knobs
from triton.runtime import driver

import moe_ops
from moe_ops._triton import replay
from moe_ops._triton.direct import TensorMap
from testing import checks, device_memory
from testing.every_op import WITH_TRITON
from testing.on_device import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    medium_sample,
    move_sample,
    some_variants,
)

pytestmark = pytest.mark.gpu

NUM_TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 200, 256, 128, 8, 2
CALLS = 5


@pytest.fixture(autouse=True)
def no_records():
    replay.forget()
    yield
    replay.forget()


def num_records():
    return sum(len(replays.records) for replays in replay._all_replays)


def leaf(*sizes, device=DEVICE):
    return (torch.randn(sizes, device=device) * 0.1).bfloat16().requires_grad_()


def new_block(device=DEVICE):
    ids = torch.rand(NUM_TOKENS, EXPERTS, device=device).topk(TOP_K).indices.int()
    weights = torch.rand(NUM_TOKENS, TOP_K, device=device).requires_grad_()
    return [leaf(NUM_TOKENS, HIDDEN, device=device), leaf(EXPERTS, 2 * WIDTH, HIDDEN, device=device),
            leaf(EXPERTS, HIDDEN, WIDTH, device=device), ids, weights]  # fmt: skip


def step(block):
    """Return the output and all gradients."""
    output = moe_ops.fused_experts(*block)
    leaves = [t for t in block if t.requires_grad]
    return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))


def first_step(block):
    """Return the same, launched by Triton."""
    replay.forget()
    return step(block)


def assert_replayed(block):
    """Check that a step replays, and gives what Triton's launches give."""
    for _ in range(3):
        step(block)
    found = step(block)
    assert num_records() >= 3
    for got, want in zip(found, first_step(block), strict=True):
        assert torch.equal(got, want)


def clone(block):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in block]


def test_other_tensors_of_the_same_sizes():
    blocks = [new_block() for _ in range(CALLS)]
    found = [step(block) for block in blocks]
    assert num_records() == 3
    for block, got in zip(blocks, found, strict=True):
        for a, b in zip(got, first_step(block), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_op_is_replayed(name):
    """What an op's second call records gives the bits of the first, in memory that holds NaN."""
    assert_variants_are_replayed(name)


@pytest.mark.parametrize("ranks", [{"A": 0}, {"B": 0}], ids=str)
@pytest.mark.parametrize("name", [name for name in WITH_TRITON if "_lora" in name])
def test_a_layer_with_one_adapter_is_replayed(name, ranks):
    assert_variants_are_replayed(name, **ranks)


def assert_variants_are_replayed(name, **sizes):
    for seed, variant in enumerate(some_variants(name, at_most=12)):
        sample = medium_sample(name, seed, variant, dtype=DTYPES[seed % len(DTYPES)], **sizes)
        moved = [move_sample(sample) for _ in range(CALLS)]
        with torch.no_grad(), checks.poisoned_memory():
            found = [call() for call in moved]
        for got in found[1:]:
            assert_same_bits(got, found[0], sample)
    asked = [replays for replays in replay._all_replays if replays._calls]
    assert num_records() > 0
    for replays in asked:
        assert not replays.not_recorded, "a call could not be recorded"


def test_a_replaced_weight():
    block = new_block()
    assert_replayed(block)
    block[1] = leaf(EXPERTS, 2 * WIDTH, HIDDEN)
    assert_replayed(block)


def test_a_weight_that_moves_and_another_at_its_address():
    block = new_block()
    room = torch.empty_like(block[1])
    room.copy_(block[1].detach())
    values, block[1] = block[1], room.view(room.shape).requires_grad_()
    for _ in range(CALLS):
        step(block)
    # The next tensor lies where the first one lay.
    other = room.view(room.shape)
    other.fill_(0.01)
    block[1] = other.requires_grad_()
    found = step(block)
    for got, want in zip(found, first_step(block), strict=True):
        assert torch.equal(got, want)
    block[1] = values
    assert_replayed(block)


def test_a_resized_weight():
    block = new_block()
    assert_replayed(block)
    block[1], block[2] = leaf(EXPERTS, 4 * WIDTH, HIDDEN), leaf(EXPERTS, HIDDEN, 2 * WIDTH)
    assert_replayed(block)


def test_a_weight_offloaded_and_gathered_again():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        with torch.no_grad():
            on_host = block[1].cpu()
            block[1].untyped_storage().resize_(0)
            held = torch.full(
                (EXPERTS, 2 * WIDTH, HIDDEN), torch.nan, dtype=torch.bfloat16, device=DEVICE
            )
            block[1].untyped_storage().resize_(on_host.numel() * 2)
            block[1].copy_(on_host)
        for got, want in zip(step(block), expected, strict=True):
            assert torch.equal(got, want)
        del held


def test_a_misaligned_view_after_an_aligned_one():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        step(block)
    for offset in (1, 4, 8):
        room = torch.empty(block[1].numel() + offset, dtype=torch.bfloat16, device=DEVICE)
        moved = room[offset:].view(block[1].shape)
        moved.copy_(block[1].detach())
        shifted = [*block]
        shifted[1] = moved.requires_grad_()
        for _ in range(CALLS):
            found = step(shifted)
        for got, want in zip(found, first_step(shifted), strict=True):
            assert torch.equal(got, want)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens):
    block = new_block()
    block[0] = leaf(num_tokens, HIDDEN)
    block[3] = block[3][:num_tokens].contiguous()
    block[4] = block[4].detach()[:num_tokens].clone().requires_grad_()
    found = [step(block) for _ in range(CALLS)]
    for got, want in zip(found[-1], first_step(block), strict=True):
        assert torch.equal(got, want)


def test_more_than_2_31_elements():
    """A weight whose strides need 64 bits."""
    num_experts, width = 33, 8192
    weight = torch.zeros(num_experts, width, width, dtype=torch.bfloat16, device=DEVICE)
    assert weight.numel() > 2**31
    weight[-1].fill_diagonal_(1)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    counts[-1] = 16
    x = torch.randn(16, width, device=DEVICE).bfloat16()
    for _ in range(CALLS):
        found = moe_ops.grouped_gemm(x, weight, counts)
    assert num_records() == 1
    assert torch.equal(found, x)


def test_another_stream():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        step(block)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The product is late on the stream: what does not follow it reads NaN.
        late = [t.detach().clone() for t in block[:3]]
        for tensor in late:
            tensor.fill_(torch.nan)
        torch.cuda._sleep(50_000_000)
        for tensor, source in zip(late, block, strict=False):
            tensor.copy_(source.detach())
        found = step([*(t.requires_grad_() for t in late), *block[3:]])
    torch.cuda.current_stream().wait_stream(stream)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_another_thread():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        step(block)
    found = []
    thread = threading.Thread(target=lambda: found.extend(step(block)))
    thread.start()
    thread.join()
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_threads_at_once():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        step(block)
    wrong: list[bool] = []

    def work():
        mine = clone(block)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(50):
                found = step(mine)
                wrong.extend(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 50 * len(expected)
    assert not any(wrong)


def test_a_graph_captures_a_replay():
    block = new_block()
    for _ in range(CALLS):
        step(block)
    with torch.no_grad():
        for _ in range(CALLS):
            moe_ops.fused_experts(*block)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = moe_ops.fused_experts(*block)
        block[0].copy_(torch.randn_like(block[0]) * 0.1)
        block[3].copy_(block[3].flip(0))
        graph.replay()
        assert torch.equal(output, moe_ops.fused_experts(*block))


def test_launch_hooks_see_the_launches():
    block = new_block()
    for _ in range(CALLS):
        step(block)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        step(block)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert any("grouped_gemm" in name for name in names)
    assert len(names) >= 6


def test_peak_memory_is_not_more():
    """A replay frees its temporary tensors no later than Python does."""
    x, up, down = leaf(8192, 1024), leaf(16, 1024, 1024), leaf(16, 1024, 512)
    ids = torch.rand(8192, 16, device=DEVICE).topk(4).indices.int()
    block = [x, up, down, ids, torch.rand(8192, 4, device=DEVICE).requires_grad_()]

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = device_memory.held()
        step(block)
        torch.cuda.synchronize()
        return device_memory.most_held() - before

    peaks = [peak() for _ in range(CALLS)]
    assert num_records() == 3
    assert peaks[-1] <= peaks[0] + 2**20


def test_descriptors_are_those_of_triton(monkeypatch):
    """The bytes of every descriptor of a training step are those that Triton makes."""
    compared = []
    make = TensorMap.__init__

    def compare(self, descriptor, metadata):
        make(self, descriptor, metadata)
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        utils = driver.active.utils
        fill = getattr(utils, "fill_tma_descriptor", None) or utils.fill_tma_descriptor_tiled
        address = descriptor.base.data_ptr()
        theirs = fill(
            address, metadata["swizzle"], metadata["elem_size"],
            TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]], metadata["block_size"],
            descriptor.shape, descriptor.strides, int(descriptor.padding == "nan"),
        )  # fmt: skip
        # The map lies behind the object's head, at the next multiple of 128.
        begin = -(-(id(theirs) + 16) // 128) * 128
        compared.append(ctypes.string_at(begin, 128) == self.at(address))

    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the GPU has no TMA")
    monkeypatch.setattr(TensorMap, "__init__", compare)
    x, up, down = leaf(4096, 512), leaf(4, 1024, 512), leaf(4, 512, 512)
    ids = torch.rand(4096, 4, device=DEVICE).topk(2).indices.int()
    block = [x, up, down, ids, torch.rand(4096, 2, device=DEVICE).requires_grad_()]
    for _ in range(3):
        step(block)
    assert len(compared) >= 6
    assert all(compared)


@pytest.mark.multi_gpu
def test_another_device():
    block, there = new_block(), new_block("cuda:1")
    with torch.no_grad():
        for a, b in zip(block, there, strict=True):
            b.copy_(a)
    assert torch.cuda.current_device() == 0
    for _ in range(CALLS):
        here_found, there_found = step(block), step(there)
    assert num_records() == 6
    for a, b in zip(here_found, there_found, strict=True):
        assert torch.equal(a, b.to(a.device))
    assert torch.cuda.current_device() == 0
