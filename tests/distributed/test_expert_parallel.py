# SPDX-License-Identifier: Apache-2.0
"""A layer whose experts are spread over ranks computes what one process computes."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from moe_ops.distributed import ExpertParallel, dropped_slots, expert_parallel
from moe_ops.layers import Experts, MoE, Router
from moe_ops.layers.lora import LoraExperts
from testing import checks
from testing.ep_problem import (
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    assert_equals_one_process,
    parallel_copy,
    problem,
    summed,
)

pytestmark = pytest.mark.slow

WORLDS = [2, 4]
EXPERTS = 8


def experts(dtype=torch.float64, **options):
    return Experts(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype, **options)


def mesh_of(world_size):
    return init_device_mesh("cpu", (world_size,))


def check_routings(rank, world_size):
    mesh, whole = mesh_of(world_size), experts(bias=True)
    even = [5] * world_size
    uneven = [7, 0, 3, 1][:world_size]
    for keep_rows in (False, True):
        for routing in ("uniform", "first", "last_rank", "dropped"):
            parallel = parallel_copy(whole, mesh, keep_rows=keep_rows)
            assert_equals_one_process(whole, parallel, problem(rank, even, EXPERTS, routing))
            parallel = parallel_copy(whole, mesh, keep_rows=keep_rows, max_tokens_per_rank=7)
            assert_equals_one_process(whole, parallel, problem(rank, uneven, EXPERTS, routing))
            assert dropped_slots(parallel)[""].item() == 0


@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_routings_and_uneven_ranks(ranks, world_size):
    """All tokens to one expert, ranks whose experts get none, ranks without tokens, dropped ids."""
    ranks(world_size).run(check_routings)


OPTIONS: dict[str, Any] = {
    "interleaved": {"interleaved": True, "activation": "swiglu_oai", "activation_limit": 1.0},
    "not gated": {"gated": False, "activation": "relu_squared"},
    "weights before": {"weights_before": True},
    "recompute": {"recompute": "pre_activation"},
}


def check_options(rank, world_size):
    mesh = mesh_of(world_size)
    for options in OPTIONS.values():
        whole = experts(**options)
        parallel = parallel_copy(whole, mesh)
        assert_equals_one_process(whole, parallel, problem(rank, [6, 6], EXPERTS))


def test_options_of_experts(ranks):
    ranks(2).run(check_options)


def check_dtypes(rank, world_size):
    """Router weights keep their dtype, and sums are in fp32."""
    mesh = mesh_of(world_size)
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        whole = experts(dtype)
        given = problem(rank, [6] * world_size, EXPERTS, dtype=dtype)
        assert given.weights.dtype == torch.float32
        assert_equals_one_process(whole, parallel_copy(whole, mesh), given)


@pytest.mark.parametrize("world_size", WORLDS)
def test_dtypes(ranks, world_size):
    ranks(world_size).run(check_dtypes)


def check_bits(rank, world_size):
    mesh, whole = mesh_of(world_size), experts(torch.float32)
    given = problem(rank, [6] * world_size, EXPERTS, dtype=torch.float32)
    parallel = parallel_copy(whole, mesh)
    first = assert_equals_one_process(whole, parallel, given)
    kept = parallel_copy(whole, mesh, keep_rows=True)
    for other in (parallel, kept):
        for one, two in zip(assert_equals_one_process(whole, other, given), first, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("world_size", WORLDS)
def test_bitwise_repeatable(ranks, world_size):
    """From call to call, and whether rows are kept or dispatched again."""
    ranks(world_size).run(check_bits)


def check_parameters(rank, world_size):
    mesh = mesh_of(world_size)
    moe = MoE(Router(HIDDEN, EXPERTS, TOP_K), experts(bias=True, dtype=torch.float32))
    names = dict(moe.named_parameters())
    parallel = parallelize_module(copy.deepcopy(moe), mesh, {"": ExpertParallel()})
    assert list(dict(parallel.named_parameters())) == list(names)
    share = EXPERTS // world_size
    for name, parameter in parallel.named_parameters():
        if not name.startswith("experts."):
            assert type(parameter) is nn.Parameter
            continue
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        local = parameter.to_local()
        assert torch.equal(local, names[name][rank * share : (rank + 1) * share])
        assert local.untyped_storage().nbytes() == local.nbytes
    # Rank 0's weights are taken by all ranks, or each rank's own.
    for source, ours in ((0, False), (None, True)):
        torch.manual_seed(rank)
        own = experts(torch.float32)
        mine = own.down_proj.detach().clone()
        expert_parallel(own, mesh, src_data_rank=source)
        part = own.down_proj.to_local()
        assert torch.equal(part, mine[rank * share : (rank + 1) * share]) == (ours or rank == 0)


@pytest.mark.parametrize("world_size", WORLDS)
def test_parameters_become_shards(ranks, world_size):
    ranks(world_size).run(check_parameters)


def check_meta(rank, world_size):
    mesh = mesh_of(world_size)
    with torch.device("meta"):
        module = experts(torch.float32)
    expert_parallel(module, mesh)
    assert all(p.is_meta and isinstance(p, DTensor) for p in module.parameters())
    module.to_empty(device="cpu")
    assert module.down_proj.to_local().shape[0] == EXPERTS // world_size
    whole = experts(torch.float32)
    for name, parameter in module.named_parameters():
        share = EXPERTS // world_size
        part = getattr(whole, name).detach()[rank * share : (rank + 1) * share]
        parameter.detach().to_local().copy_(part)
    given = problem(rank, [4] * world_size, EXPERTS, dtype=torch.float32)
    assert_equals_one_process(whole, module, given)
    assert not dropped_slots(module)[""].any()


def test_on_the_meta_device(ranks):
    ranks(2).run(check_meta)


def check_compiled(rank, world_size, backend, keep_rows):
    mesh, whole = mesh_of(world_size), experts(torch.float32)
    parallel = parallel_copy(whole, mesh, keep_rows=keep_rows, max_tokens_per_rank=9)
    compiled = torch.compile(parallel, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4):
        for counts in ([6, 5], [9, 4], [3, 8]):
            given = problem(rank, counts, EXPERTS, dtype=torch.float32)
            assert_equals_one_process(whole, parallel, given, call=compiled)


@pytest.mark.parametrize(
    ("backend", "keep_rows"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiled_without_a_break(ranks, backend, keep_rows):
    ranks(2).run(check_compiled, backend=backend, keep_rows=keep_rows)


class Block(nn.Module):
    """A layer under activation checkpointing, as models have it."""

    def __init__(self, experts, checkpoints):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.experts = experts
        self.checkpoints = checkpoints

    def forward(self, hidden, ids, weights):
        def compute(hidden, weights):
            return hidden + self.experts(self.norm(hidden), ids, weights)

        if self.checkpoints:
            return checkpoint(compute, hidden, weights, use_reentrant=False)
        return compute(hidden, weights)


def check_compiled_capacity(rank, world_size):
    """Rows that have no room are the same ones, compiled for any number of tokens."""
    mesh = mesh_of(world_size)
    parallel = parallel_copy(experts(torch.float32), mesh, capacity_factor=0.25)
    copied = copy.deepcopy(parallel)
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (6, 9):
        given = problem(rank, [count] * world_size, EXPERTS, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(compiled(*given.of_rank()), copied(*given.of_rank()))
    # A copy of a parallel module counts by itself.
    one, two = (dropped_slots(module)[""] for module in (parallel, copied))
    assert one.item() == two.item() > 0
    assert one is not two


def test_compiled_with_a_capacity(ranks):
    ranks(2).run(check_compiled_capacity)


def check_checkpointing(rank, world_size):
    mesh, whole = mesh_of(world_size), Block(experts(), False)
    given = problem(rank, [6, 6], EXPERTS)
    for keep_rows in (False, True):
        parallel = Block(parallel_copy(whole.experts, mesh, keep_rows=keep_rows), True)
        parallel.norm.load_state_dict(whole.norm.state_dict())
        assert_equals_one_process(whole, parallel, given)
        compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
        assert_equals_one_process(whole, parallel, given, call=compiled)


def test_activation_checkpointing(ranks):
    ranks(2).run(check_checkpointing)


def check_kept(rank, world_size):
    """By default nothing of the capacity's size is kept for the backward."""
    mesh, whole = mesh_of(world_size), experts(torch.float32)
    given = problem(rank, [40] * world_size, EXPERTS, dtype=torch.float32)
    kept = {}
    for keep_rows in (False, True):
        parallel = parallel_copy(whole, mesh, keep_rows=keep_rows)
        shards = [p.to_local() for p in parallel.parameters() if isinstance(p, DTensor)]
        parameters = {shard.untyped_storage().data_ptr() for shard in shards}
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes, parameters=parameters):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden, ids, weights = given.of_rank()
            parallel(hidden * 1, ids, weights * 1)
        kept[keep_rows] = sum(sizes.values())
    received = world_size * 40 * HIDDEN * 4
    assert kept[True] > received
    # Tokens, ids and weights of this rank, and where the slots went.
    hidden, ids, weights = given.of_rank()
    assert kept[False] == hidden.nbytes + ids.nbytes + weights.nbytes + 4 * ids.numel()


def test_what_is_kept(ranks):
    ranks(4).run(check_kept)


def check_capacity(rank, world_size):
    """What has no room adds exactly zero and is counted; the rest is as if it had not been asked."""
    mesh, whole = mesh_of(world_size), experts()
    for routing in ("uniform", "first"):
        given = problem(rank, [16] * world_size, EXPERTS, routing)
        parallel = parallel_copy(whole, mesh, capacity_factor=0.5)
        capacity = -(-16 * TOP_K // (2 * world_size))
        kept, num_dropped = given.ids.clone(), 0
        for start in range(0, 16 * world_size, 16):
            for destination in range(world_size):
                part = given.ids[start : start + 16]
                is_sent = part // (EXPERTS // world_size) == destination
                tokens = (is_sent & (part >= 0)).any(1).nonzero().flatten()[capacity:]
                lost = torch.zeros_like(is_sent)
                lost[tokens] = is_sent[tokens] & (part[tokens] >= 0)
                kept[start : start + 16][lost] = -1
                num_dropped += int(lost.sum()) if start == 16 * rank else 0
        assert num_dropped > 0
        full = copy.deepcopy(given)
        given.ids = kept
        # The parallel layer is asked for all of them.
        calls: list[torch.Tensor] = []

        def call(hidden, ids, weights, parallel=parallel, full=full, calls=calls):
            calls.append(parallel(hidden, full.ids[full.own], weights))
            return calls[-1]

        assert_equals_one_process(whole, parallel, given, call=call)
        assert dropped_slots(parallel)[""].item() == num_dropped
        nothing = (kept[given.own] < 0).all(1)
        assert nothing.any()
        assert calls[0][nothing].eq(0).all()


@pytest.mark.parametrize("world_size", WORLDS)
def test_capacity_factor(ranks, world_size):
    ranks(world_size).run(check_capacity)


def check_accumulation(rank, world_size):
    mesh, whole = mesh_of(world_size), experts()
    parallel = parallel_copy(whole, mesh)
    for seed in range(3):
        given = problem(rank, [5, 5], EXPERTS, seed=seed)
        whole(*given.of_all()).backward(given.tangent)
        parallel(*given.of_rank()).backward(given.tangent[given.own])
    for one, two in zip(parallel.parameters(), whole.parameters(), strict=True):
        assert isinstance(one.grad, DTensor)
        checks.assert_close(summed(one.grad), two.grad)


def test_gradients_accumulate(ranks):
    ranks(2).run(check_accumulation)


def check_autocast(rank, world_size):
    mesh, whole = mesh_of(world_size), experts(torch.float32)
    given = problem(rank, [6, 6], EXPERTS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        parallel = parallel_copy(whole, mesh)
        assert_equals_one_process(whole, parallel, given, dtype=torch.bfloat16)


def test_autocast(ranks):
    ranks(2).run(check_autocast)


def check_two_models_and_groups(rank, world_size):
    """Two models in one process, one of them on a second group that is made while the first is used."""
    mesh, one, two = mesh_of(world_size), experts(), experts(bias=True)
    given = problem(rank, [6, 6], EXPERTS)
    first = parallel_copy(one, mesh)
    before = assert_equals_one_process(one, first, given)
    group = distributed.new_group(ranks=[0, 1], backend="gloo")
    other = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
    second = parallel_copy(two, other)
    hidden, ids, weights = given.of_rank()
    output = second(first(hidden, ids, weights), ids, weights)
    want_hidden, all_ids, want_weights = given.of_all()
    want = two(one(want_hidden, all_ids, want_weights), all_ids, want_weights)
    checks.assert_close(output, want[given.own])
    (found,) = torch.autograd.grad(output, hidden, given.tangent[given.own])
    (expected,) = torch.autograd.grad(want, want_hidden, given.tangent)
    checks.assert_close(found, expected[given.own])
    distributed.destroy_process_group(group)
    for a, b in zip(assert_equals_one_process(one, first, given), before, strict=True):
        assert torch.equal(a, b)


def test_two_models_and_two_groups(ranks):
    ranks(2).run_last(check_two_models_and_groups)


def check_errors(rank, world_size):
    mesh = mesh_of(world_size)
    with pytest.raises(ValueError, match="divides the 3 experts, got 2; use a mesh whose size"):
        expert_parallel(Experts(3, HIDDEN, INTERMEDIATE), mesh)
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        expert_parallel(experts(), init_device_mesh("cpu", (2, 1)))
    with pytest.raises(ValueError, match="expected a model with experts modules, got Linear"):
        expert_parallel(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match=r"expected an experts module .*, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, ExpertParallel())
    with pytest.raises(ValueError, match=r"not compiled yet, .*; compile after expert_parallel"):
        parallelize_module(cast(nn.Module, torch.compile(experts())), mesh, ExpertParallel())
    both = nn.ModuleList([experts(), Experts(3, HIDDEN, INTERMEDIATE)])
    with pytest.raises(ValueError, match="divides the 3 experts"):
        expert_parallel(both, mesh)
    # What is not refused stays as it was.
    assert not any(isinstance(parameter, DTensor) for parameter in both.parameters())
    parallel = expert_parallel(experts(), mesh, max_tokens_per_rank=3)
    with pytest.raises(ValueError, match="apply ExpertParallel once"):
        expert_parallel(parallel, mesh)
    given = problem(rank, [4, 4], EXPERTS)
    with pytest.raises(ValueError, match=r"at most max_tokens_per_rank \(3\) tokens, got 4"):
        parallel(*given.of_rank())
    with pytest.raises(
        ValueError, match="expected max_tokens_per_rank > 0 and finite, or None, got 0"
    ):
        ExpertParallel(max_tokens_per_rank=0)
    with pytest.raises(TypeError, match="max_tokens_per_rank to be an int or None, got True"):
        ExpertParallel(max_tokens_per_rank=True)
    with pytest.raises(
        ValueError, match="expected capacity_factor > 0 and finite, or None, got -1"
    ):
        ExpertParallel(capacity_factor=-1)


def check_a_replaced_submodule(rank, world_size):
    """The view of this rank's experts would go on with the old one."""
    given = problem(rank, [4, 4], EXPERTS).of_rank()
    layer = LoraExperts(experts(), rank=2)
    parallel: Any = expert_parallel(layer, mesh_of(world_size))
    parallel(*given)
    parallel.adapters["down_proj"] = copy.deepcopy(parallel.adapters["down_proj"])
    with pytest.raises(
        ValueError, match="ModuleDict with the submodules that it had at expert_par"
    ):
        parallel(*given)


def test_a_replaced_submodule(ranks):
    ranks(2).run(check_a_replaced_submodule)


def check_a_small_capacity(rank, world_size):
    """There is room for one token of each rank, however small the factor is."""
    given = problem(rank, [4, 4], EXPERTS).of_rank()
    parallel = expert_parallel(experts(), mesh_of(world_size), capacity_factor=1e-9)
    assert parallel(*given).any(1).sum() >= 1


def test_a_small_capacity(ranks):
    ranks(2).run(check_a_small_capacity)


def test_errors(ranks):
    ranks(2).run(check_errors)
