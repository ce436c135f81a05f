# SPDX-License-Identifier: Apache-2.0
"""Calls that are replayed through the CUDA driver: they do what Triton's launches did.

The second call with the same sizes is recorded and the third is the first that replays
(src/moe_ops/_triton/replay.py).
"""

import ctypes
import gc
import threading

import pytest
import torch
from triton import knobs
from triton.runtime import driver

import moe_ops
from moe_ops._triton import replay
from moe_ops._triton.direct import TensorMap
from moe_ops._triton.replay import Record
from testing import checks, device_memory
from testing.every_op import WITH_TRITON
from testing.on_device import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    medium_sample,
    memory_slot,
    move_sample,
    some_variants,
)

pytestmark = pytest.mark.gpu

NUM_TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 200, 256, 128, 8, 2
CALLS = 5
# The ops of a step: the forward and two parts of the backward.
OPS = 3
# Places in a block.
X, UP, DOWN, IDS, WEIGHTS = range(5)

# An entry for each call that was replayed, from any thread.
replayed: list[Record] = []


@pytest.fixture(autouse=True)
def no_records(monkeypatch):
    do_again = Record._replay

    def noted(record, addresses):
        replayed.append(record)
        return do_again(record, addresses)

    monkeypatch.setattr(Record, "_replay", noted)
    replay.forget()
    yield
    replay.forget()
    replayed.clear()


def num_records():
    return sum(len(replays.records) for replays in replay._all_replays)


def leaf(*sizes, device=DEVICE):
    return (torch.randn(sizes, device=device) * 0.1).bfloat16().requires_grad_()


def new_block(
    device=DEVICE, tokens=NUM_TOKENS, hidden=HIDDEN, width=WIDTH, experts=EXPERTS, top_k=TOP_K
):
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices.int()
    weights = torch.rand(tokens, top_k, device=device).requires_grad_()
    return [leaf(tokens, hidden, device=device), leaf(experts, 2 * width, hidden, device=device),
            leaf(experts, hidden, width, device=device), ids, weights]  # fmt: skip


def step(block, tangent=None):
    """Return the output and all gradients."""
    output = moe_ops.fused_experts(*block)
    leaves = [t for t in block if t.requires_grad]
    tangent = torch.ones_like(output) if tangent is None else tangent
    return output, *torch.autograd.grad(output, leaves, tangent)


def first_step(block, tangent=None):
    """Return the same, launched by Triton."""
    replay.forget()
    return step(block, tangent)


def replayed_step(block, tangent=None):
    """Return the same from a step that has to be a replay."""
    before = len(replayed)
    found = step(block, tangent)
    assert len(replayed) - before == OPS
    return found


def assert_equal(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def assert_replayed(block):
    """Check that a step replays, and gives what Triton's launches give."""
    for _ in range(3):
        step(block)
    found = replayed_step(block)
    assert num_records() >= OPS
    assert_equal(found, first_step(block))


def clone(block):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in block]


def free(block, place):
    """Free a tensor of the block, and return where it was."""
    # Whatever else could be allocated at once in its place.
    torch.cuda.empty_cache()
    address = block[place].data_ptr()
    block[place] = None
    gc.collect()
    return address


def allocate_at(address, size):
    """Return a new tensor at an address where one of as many elements was freed."""
    others = []
    for _ in range(32):
        made = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
        if made.data_ptr() == address:
            return made
        others.append(made)
    raise AssertionError("the allocator gave no tensor at the address that was freed")


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
    for _ in range(CALLS):
        step(block)
    block[UP] = leaf(EXPERTS, 2 * WIDTH, HIDDEN)
    for _ in range(CALLS):
        found = replayed_step(block)
    assert num_records() == OPS
    assert_equal(found, first_step(block))


def large_block(hidden=1024, width=512, experts=EXPERTS):
    """Return a block with an up projection of 16 MiB, of which the allocator makes no parts."""
    return new_block(hidden=hidden, width=width, experts=experts)


@pytest.mark.parametrize("other", ["values", "widths", "experts", "strides"])
def test_another_weight_at_the_address_of_a_freed_one(other):
    """What TMA is told of a weight is its address, its shape and its strides."""
    block = large_block()
    sizes = {"widths": {"hidden": 512, "width": 1024}, "experts": {"experts": EXPERTS // 2}}
    other_block = large_block(**sizes.get(other, {}))
    values = other_block[UP].detach()
    if other == "strides":
        values = values.mT
    other_block[UP] = values.clone().requires_grad_()
    assert other_block[UP].stride() == values.stride()
    want = first_step(other_block)
    replay.forget()
    # What is freed has no neighbour that is free: then the allocator would join the two.
    torch.cuda.empty_cache()
    kept, block[UP] = block[UP], block[UP].detach().clone().requires_grad_()
    for _ in range(CALLS):
        step(block)
    address = free(block, UP)
    room = allocate_at(address, kept.numel())
    weight = room.as_strided(values.shape, values.stride()).copy_(values)
    other_block[UP] = weight.requires_grad_()
    assert weight.data_ptr() == address
    assert (weight.shape != kept.shape) == (other in sizes)
    assert (weight.stride() != kept.stride()) == (other in ("widths", "strides"))
    for call in range(CALLS):
        is_known = other == "values" or call >= 2
        assert_equal((replayed_step if is_known else step)(other_block), want)
    assert num_records() == (OPS if other == "values" else 2 * OPS)


def test_a_weight_of_other_sizes():
    block = new_block()
    for _ in range(CALLS):
        step(block)
    block[UP], block[DOWN] = leaf(EXPERTS, 4 * WIDTH, HIDDEN), leaf(EXPERTS, HIDDEN, 2 * WIDTH)
    assert_replayed(block)


def test_a_weight_resized_in_place():
    """The first two shapes have one address, the third has another, and the first comes again."""
    sizes = [(256, 128), (128, 256), (256, 512), (256, 128)]
    blocks = [new_block(hidden=hidden, width=width) for hidden, width in sizes]
    for block in blocks:
        block[UP] = block[UP].detach()
    wanted = [first_step(block) for block in blocks]
    replay.forget()
    weight = torch.empty_like(blocks[0][UP])
    addresses = []
    for block, want in zip(blocks, wanted, strict=True):
        weight.resize_(block[UP].shape).copy_(block[UP])
        block[UP] = weight
        addresses.append(weight.data_ptr())
        is_known = len(addresses) == len(sizes)
        for call in range(CALLS):
            assert_equal((replayed_step if is_known or call >= 2 else step)(block), want)
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
    assert num_records() == 3 * OPS


def test_a_weight_offloaded_and_gathered_again():
    block = new_block()
    expected = first_step(block)
    for _ in range(CALLS):
        step(block)
    for _ in range(CALLS):
        with torch.no_grad():
            on_host, address = block[UP].cpu(), block[UP].data_ptr()
            storage = block[UP].untyped_storage()
            num_bytes = storage.nbytes()
            # The old memory is kept from the new storage by whoever has it now.
            held: list[torch.Tensor] = []
            torch.cuda.empty_cache()
            storage.resize_(0)
            while not any(t.data_ptr() <= address < t.data_ptr() + t.nbytes for t in held):
                assert len(held) < 256, "the allocator does not give the old memory again"
                held.append(torch.full_like(on_host, torch.nan, device=DEVICE))
            storage.resize_(num_bytes)
            assert block[UP].data_ptr() != address
            block[UP].copy_(on_host)
        assert_equal(replayed_step(block), expected)
        del held
    assert num_records() == OPS


def shifted(tensor, offset):
    """Return the same values, so many elements behind the beginning of an allocation."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)
    moved = room[offset:].view(tensor.shape)
    return moved.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("what", ["hidden_states", "gate_up_proj", "down_proj", "gradient"])
def test_a_misaligned_view_after_an_aligned_one(what):
    block, tangent = new_block(), leaf(NUM_TOKENS, HIDDEN).detach()
    cases = []
    for offset in (1, 4, 8):
        place = {"hidden_states": X, "gate_up_proj": UP, "down_proj": DOWN, "gradient": None}[what]
        if place is None:
            cases.append((block, shifted(tangent, offset)))
        else:
            moved = [*block]
            moved[place] = shifted(block[place], offset)
            cases.append((moved, tangent))
    wanted = [first_step(*case) for case in cases]
    expected = first_step(block, tangent)
    for _ in range(CALLS):
        step(block, tangent)
    assert num_records() == OPS
    for case, want in zip(cases, wanted, strict=True):
        for _ in range(CALLS):
            found = step(*case)
            assert_equal(found, want)
        for got, aligned in zip(found, expected, strict=True):
            assert (got.float() - aligned.float()).norm() < 2e-2 * aligned.float().norm()
        # The aligned one still has its records.
        assert_equal(replayed_step(block, tangent), expected)
    # Offsets of 2 and of 8 bytes are two more alignments, and one of 16 bytes is none.
    assert num_records() >= OPS + 2


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens):
    block = new_block()
    block[X] = leaf(num_tokens, HIDDEN)
    block[IDS] = block[IDS][:num_tokens].contiguous()
    block[WEIGHTS] = block[WEIGHTS].detach()[:num_tokens].clone().requires_grad_()
    found = [step(block) for _ in range(CALLS)]
    assert len(replayed) >= num_records() > 0
    assert_equal(found[-1], first_step(block))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(NUM_TOKENS, 1, 1), (NUM_TOKENS, EXPERTS, 1), (1, 1, 1)]
)
def test_sizes_of_one(tokens, experts, top_k):
    """A dimension of size 1 may have any stride, which no descriptor could take."""
    block = new_block(tokens=tokens, experts=experts, top_k=top_k)
    want = first_step(block)
    replay.forget()
    for _ in range(2):
        step(block)
    for _ in range(CALLS):
        assert_equal(replayed_step(block), want)
    odd = [
        t.detach()
        .as_strided(t.shape, [7 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])
        .requires_grad_(t.requires_grad)
        for t in block
    ]
    assert any(a.stride() != b.stride() for a, b in zip(odd, block, strict=True))
    want = first_step(odd)
    replay.forget()
    for _ in range(2):
        step(odd)
    assert_equal(replayed_step(odd), want)


# The kernels that read by addresses, those that read by TMA, and those for Hopper.
@pytest.mark.parametrize("num_rows", [16, 33 * 64, 33 * 128])
def test_more_than_2_31_elements(num_rows):
    """A weight and its gradient, whose strides need 64 bits."""
    # 9 GiB beside what other tests hold.
    with memory_slot():
        check_more_than_2_31_elements(num_rows)


def check_more_than_2_31_elements(num_rows):
    num_experts, width = 33, 8192
    weight = torch.zeros(num_experts, width, width, dtype=torch.bfloat16, device=DEVICE)
    assert weight.numel() > 2**31
    weight[-1].fill_diagonal_(1)
    weight.requires_grad_()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    counts[-1] = num_rows
    x, g = (leaf(num_rows, width) for _ in range(2))
    want = g.detach().float().t() @ x.detach().float()
    made = []
    for _ in range(CALLS):
        before = len(replayed)
        output = moe_ops.grouped_gemm(x, weight, counts)
        dx, dw = torch.autograd.grad(output, (x, weight), g.detach())
        assert torch.equal(output, x)
        assert torch.equal(dx, g)
        assert not dw[:-1].any()
        made.append(dw[-1].clone())
        # Else there would be two of them.
        del dw
    checks.assert_close(made[0], want)
    for other in made[1:]:
        assert torch.equal(other, made[0])
    # The forward, dX and dW.
    assert num_records() == 3
    assert len(replayed) - before == 3


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
        found = replayed_step([*(t.requires_grad_() for t in late), *block[3:]])
    torch.cuda.current_stream().wait_stream(stream)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_another_thread():
    block = new_block()
    expected = step(block)
    for _ in range(CALLS):
        step(block)
    found = []
    thread = threading.Thread(target=lambda: found.extend(replayed_step(block)))
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


@pytest.mark.parametrize("when", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_see_the_launches(when):
    block = new_block()
    for _ in range(CALLS):
        step(block)
    expected = replayed_step(block)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    hooks = getattr(knobs.runtime, when)
    hooks.add(hook)
    try:
        before = len(replayed)
        found = step(block)
        assert len(replayed) == before
    finally:
        hooks.remove(hook)
    assert any("grouped_gemm" in name for name in names)
    assert len(names) >= 6
    assert_equal(found, expected)
    # They replay again, and no hook is called.
    seen = len(names)
    replayed_step(block)
    assert len(names) == seen


def test_a_replay_does_not_wait_for_the_gpu():
    """Nor does the driver, whose waiting torch.cuda.set_sync_debug_mode would not see."""
    block = new_block()
    for _ in range(CALLS):
        step(block)
    torch.cuda.synchronize()
    is_idle = torch.cuda.Event()
    # A second and more, where a step takes less than a millisecond of the host.
    torch.cuda._sleep(3_000_000_000)
    is_idle.record()
    replayed_step(block)
    assert not is_idle.query()


def test_records_hold_no_memory():
    """Neither the tensors of the calls that were recorded, nor any of their own."""

    def steps(hidden):
        block = new_block(hidden=hidden)
        for _ in range(CALLS):
            step(block)
        replayed_step(block)

    def held():
        gc.collect()
        torch.cuda.synchronize()
        return device_memory.held()

    # What torch and Triton allocate once and keep.
    steps(HIDDEN)
    before = held()
    steps(2 * HIDDEN)
    assert num_records() == 2 * OPS
    assert held() == before


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
