# SPDX-License-Identifier: Apache-2.0
"""Experts on 2, 4 and 8 GPUs, over both transports: NCCL's collectives, and pushes to the peers.

The checks run in processes, one for each GPU, that the tests of a worker share.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import moe_ops
from moe_ops._core.transport import ENVIRONMENT_VARIABLE, Plan, plan_of
from testing import ep_ops
from testing.ep_problem import assert_equals_one_process, parallel_copy, problem
from testing.ranks import ROOT, TIMEOUT, Ranks, init

WORLD_SIZES = [pytest.param(n, marks=pytest.mark.multi_gpu(n), id=f"{n}_gpus") for n in (2, 4, 8)]
every_world = pytest.mark.parametrize("world_size", WORLD_SIZES)
TRANSPORTS = ("functional", "symmetric")
both = pytest.mark.parametrize("transport", TRANSPORTS)

TOKENS, TOP_K, EXPERTS, HIDDEN = 64, 4, 8, 256


@pytest.fixture(scope="module", params=WORLD_SIZES)
def gpus(request):
    if not distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    ranks = Ranks(request.param, "nccl")
    yield ranks
    ranks.end()


@contextlib.contextmanager
def over(transport):
    """Ask for a transport, in a process of a rank."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(ENVIRONMENT_VARIABLE, transport)
        yield


class Block:
    """Dispatch, something that each row feels, and combine, with the gradients of both inputs."""

    def __init__(self, rank, num_tokens=TOKENS, hidden=HIDDEN, group=None):
        generator = torch.Generator().manual_seed(rank)

        def draw(*shape):
            return torch.randn(shape, generator=generator).cuda()

        self.hidden = draw(num_tokens, hidden).bfloat16().requires_grad_()
        self.ids = draw(num_tokens, EXPERTS).topk(TOP_K).indices.int()
        self.weights = draw(num_tokens, TOP_K).requires_grad_()
        self.tangent = draw(num_tokens, hidden).bfloat16()
        world_size = distributed.get_world_size()
        self.sizes = (EXPERTS, world_size, num_tokens, group or ep_ops.group_name())

    def forward(self, hidden, ids, weights):
        rows, local_ids, local_weights, sent_slots, _ = moe_ops.ep_dispatch(
            hidden, ids, weights, *self.sizes
        )
        scale = (local_weights * (local_ids + 1)).sum(1, keepdim=True)
        rows = torch.where(local_ids[:, :1] >= 0, rows * scale.to(rows.dtype), 0.0)
        return moe_ops.ep_combine(rows, local_ids, sent_slots, *self.sizes)

    def step(self, forward=None):
        """Return the output and both gradients: four exchanges."""
        output = (forward or self.forward)(self.hidden, self.ids, self.weights)
        leaves = (self.hidden, self.weights)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.tangent)]


def assert_same(found, expected):
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def expected_of(block):
    """Return a step's results over the other transport, which the checks hold against the oracle."""
    with over("functional"):
        return block.step()


def check_ops(rank, world_size, transport):
    with over(transport):
        ep_ops.check_against_the_oracle(rank, world_size, device="cuda")
        ep_ops.check_bits(rank, world_size, device="cuda")


@both
def test_against_the_oracle(gpus, transport):
    gpus.run(check_ops, transport=transport)


def check_layer(rank, world_size, transport, is_compiled):
    """The layer of all ranks is the layer of one process, with all gradients."""
    from moe_ops.layers import Experts

    whole = Experts(8, 16, 24, bias=True, device="cuda")
    mesh = init_device_mesh("cuda", (world_size,))
    uneven = [7, 0, 3, 1, 0, 5, 2, 7][:world_size]
    with over(transport):
        for routing in ("uniform", "first", "last_rank", "dropped"):
            for counts, most in (([6] * world_size, None), (uneven, 7)):
                given = problem(rank, counts, 8, routing, torch.float32)
                moved = {
                    field.name: getattr(given, field.name).cuda()
                    for field in dataclasses.fields(given)
                    if field.name != "own"
                }
                given = dataclasses.replace(given, **moved)
                parallel = parallel_copy(whole, mesh, max_tokens_per_rank=most)
                call = torch.compile(parallel, fullgraph=True) if is_compiled else None
                assert_equals_one_process(whole, parallel, given, call=call)
            if is_compiled:
                break


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@both
def test_a_layer(gpus, transport, is_compiled):
    gpus.run(check_layer, transport=transport, is_compiled=is_compiled)


def check_compiled(rank, world_size, transport):
    """Inductor rounds what stands between the ops otherwise, and alike over both transports."""
    block = Block(rank)
    compiled = torch.compile(block.forward, fullgraph=True)
    with over("functional"):
        expected = block.step(compiled)
        torch.testing.assert_close(expected, block.step(), rtol=2e-2, atol=2e-1)
    with over(transport):
        for _ in range(3):
            assert_same(block.step(compiled), expected)


@both
def test_compiled_ops(gpus, transport):
    gpus.run(check_compiled, transport=transport)


def check_synchronization(rank, world_size, transport):
    block = Block(rank)
    with over(transport):
        expected = block.step()
        # The second call of an op is watched, the third may be replayed.
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = block.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_same(found, expected)


@both
def test_never_synchronizes(gpus, transport):
    gpus.run(check_synchronization, transport=transport)


def check_graph(rank, world_size, transport):
    """A graph of three exchanges, an odd number, is replayed among others."""
    block, other = Block(rank), Block(rank + 7)

    def forward_and_dispatch():
        with torch.no_grad():
            output = block.forward(block.hidden, block.ids, block.weights)
            again = moe_ops.ep_dispatch(block.hidden, block.ids, block.weights, *block.sizes)
        return output, again[0].masked_fill(again[1][:, :1] < 0, 0.0), again[1]

    expected_step = expected_of(other)
    with over(transport):
        expected = [t.clone() for t in forward_and_dispatch()]
        assert_same(other.step(), expected_step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward_and_dispatch()
        for turn in range(5):
            for output in found:
                output.zero_()
            graph.replay()
            assert_same(found, expected)
            if turn % 2:
                assert_same(other.step(), expected_step)
        # A larger call makes the pool grow. The graph keeps the memory that it knows.
        large = Block(rank, num_tokens=16 * TOKENS, hidden=8 * HIDDEN)
        large.step()
        for _ in range(3):
            graph.replay()
            assert_same(found, expected)
            assert_same(other.step(), expected_step)
        torch.cuda.synchronize()


@both
def test_a_graph_with_an_odd_number_of_exchanges(gpus, transport):
    gpus.run(check_graph, transport=transport)


def check_growth_in_a_capture(rank, world_size):
    block = Block(rank)
    with over("symmetric"):
        block.step()
        torch.cuda.synchronize()
        large = Block(rank, num_tokens=64 * TOKENS, hidden=8 * HIDDEN)
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match="cannot capture the growth"),
            torch.cuda.graph(graph),
        ):
            moe_ops.ep_dispatch(large.hidden, large.ids, large.weights, *large.sizes)
        torch.cuda.synchronize()
        assert_same(block.step(), expected_of(block))


def test_a_pool_does_not_grow_in_a_capture(gpus):
    gpus.run(check_growth_in_a_capture)


def check_streams(rank, world_size, transport):
    """Exchanges on streams by turns use one pool: each waits for the last one."""
    block, other = Block(rank), Block(rank + 7)
    expected = [expected_of(each) for each in (block, other)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with over(transport):
        for each in (block, other):
            each.step()
        torch.cuda.synchronize()
        for _ in range(4):
            found = []
            for each, stream in zip((block, other), streams, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(2_000_000)
                    found.append(each.step())
            torch.cuda.synchronize()
            for got, want in zip(found, expected, strict=True):
                assert_same(got, want)


@both
def test_streams_by_turns(gpus, transport):
    gpus.run(check_streams, transport=transport)


def check_groups(rank, world_size, transport, folder):
    """A second group while the first is in use, then a first that is made again."""
    expected = expected_of(Block(rank))
    with over(transport):
        second = distributed.new_group(list(range(world_size)))
        blocks = [Block(rank), Block(rank, group=second.group_name)]
        for _ in range(3):
            for block in blocks:
                assert_same(block.step(), expected)
        del second, blocks, block
        distributed.destroy_process_group()
        init(f"{folder}/store", rank, world_size, backend="nccl")
        for _ in range(3):
            assert_same(Block(rank).step(), expected)


@both
def test_groups(gpus, transport, tmp_path):
    gpus.run(check_groups, transport=transport, folder=str(tmp_path))


# A process of its own for each rank, whose GPU an error ends.
BEGIN = """
import os, sys, time, torch
import moe_ops
from testing import ep_ops
from testing.ranks import init

rank, world_size, limit = map(int, sys.argv[2:])
init(sys.argv[1], rank, world_size, timeout=limit, backend="nccl")

def call_of(tokens):
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device="cuda")
    rows, weights = (torch.ones(tokens, n, device="cuda") for n in (8, 1))
    return rows, ids, weights, world_size, world_size, tokens, ep_ops.group_name()

call = call_of(4)
moe_ops.ep_dispatch(*call)
torch.cuda.synchronize()
print("alive", flush=True)
"""
# The last rank makes one exchange less than the others.
ALONE = """
if rank < world_size - 1:
    moe_ops.ep_dispatch(*call)
    torch.cuda.synchronize()
else:
    time.sleep(600)
"""


# The ranks have different numbers of tokens, and say that they have equally many.
UNEVEN = """
for _ in range(2):
    moe_ops.ep_dispatch(*call_of(3 + rank))
torch.cuda.synchronize()
"""


def ended(program, world_size, folder, limit):
    """Yield how each rank's process of a program ends: return code, stderr and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), ENVIRONMENT_VARIABLE: "symmetric"}
    arguments = [[folder / "store", rank, world_size, limit] for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + program, *map(str, given)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for given in arguments
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "alive\n", process.communicate(timeout=TIMEOUT)
        start = time.monotonic()
        yield from (
            (process, process.communicate(timeout=limit + TIMEOUT)[1], time.monotonic() - start)
            for process in processes
        )
    finally:
        for process in processes:
            process.kill()


@every_world
def test_a_peer_that_never_comes(tmp_path, world_size):
    """The barrier ends within the group's time limit, with an error of the GPU."""
    limit = 20
    process, err, took = next(ended(ALONE, world_size, tmp_path, limit))
    assert process.returncode != 0
    assert "CUDA error" in err, err[-2000:]
    assert limit - 2 < took < limit + TIMEOUT


@every_world
def test_ranks_of_different_sizes_are_stopped(tmp_path, world_size):
    """Else each would read the other's rows at wrong places."""
    for process, err, _ in ended(UNEVEN, world_size, tmp_path, limit=60):
        assert process.returncode != 0
        assert "ranks exchanged different numbers of tokens" in err, err[-2000:]


def check_default(rank, world_size):
    """Without a word the ranks push."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv(ENVIRONMENT_VARIABLE, raising=False)
        found = plan_of(world_size, ep_ops.group_name(), torch.device("cuda", rank), True)
    assert found == Plan("symmetric", "all GPUs access each other")


def test_the_default(gpus):
    gpus.run(check_default)
