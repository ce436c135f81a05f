# SPDX-License-Identifier: Apache-2.0
"""Calls of a parallel experts module in other ways than the plain one."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from moe_ops.distributed import ExpertParallel, dropped_slots, expert_parallel
from moe_ops.layers import Experts
from testing import checks
from testing.ep_problem import grad_of, summed

pytestmark = pytest.mark.slow

EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 8


def draw(rank):
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(6, HIDDEN, generator=generator)
    ids = torch.rand(6, EXPERTS, generator=generator).topk(2).indices
    return hidden, ids, torch.rand(6, 2, generator=generator)


def check_divisor(rank, world_size):
    """A forward, another model that goes away, then fully_shard: the mean is that of all ranks."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("fsdp", "ep"))
    experts, gradients = Experts(EXPERTS, HIDDEN, INTERMEDIATE), []
    for comes_late in (False, True):
        # So that as many modules are under fully_shard before as after.
        model: Any = None
        gc.collect()
        model = copy.deepcopy(experts)
        other = fully_shard(nn.Linear(4, 4), mesh=mesh["fsdp"]) if comes_late else None
        expert_parallel(model, mesh["ep"])
        if comes_late:
            model(*draw(rank))
        del other
        gc.collect()
        fully_shard(model, mesh=mesh["fsdp"])
        model(*draw(rank)).sum().backward()
        gradients.append(summed(grad_of(model.gate_up_proj)))
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_fully_shard_after_a_call(ranks):
    ranks(2).run(check_divisor)


def check_copies(rank, world_size):
    """A copy asks whether its own parameters are under fully_shard."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("fsdp", "ep"))
    gradients = []
    for is_copied in (False, True):
        torch.manual_seed(0)
        model: Any = nn.ModuleList(
            [expert_parallel(Experts(EXPERTS, HIDDEN, INTERMEDIATE), mesh["ep"])]
        )
        model = copy.deepcopy(model) if is_copied else model
        fully_shard(model[0], mesh=mesh["fsdp"])
        model[0](*draw(rank)).sum().backward()
        gradients.append(summed(grad_of(model[0].gate_up_proj)))
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_copies(ranks):
    ranks(2).run(check_copies)


def check_compiled_one_by_one(rank, world_size):
    """More layers than torch.compile compiles anew share one graph, and one more under fully_shard."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("fsdp", "ep"))
    given = draw(rank)
    for is_sharded in (False, True):
        torch._dynamo.utils.counters.clear()
        layers: list[Any] = [Experts(EXPERTS, HIDDEN, INTERMEDIATE) for _ in range(10)]
        gradients = []
        for layer in layers:
            expert_parallel(layer, mesh["ep"])
            if is_sharded:
                fully_shard(layer, mesh=mesh["fsdp"])
            layer(*given).sum().backward()
            gradients.append(summed(grad_of(layer.gate_up_proj)))
            layer.zero_grad()
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.compile(backend="aot_eager", fullgraph=not is_sharded)
            layer(*given).sum().backward()
            torch.testing.assert_close(summed(grad_of(layer.gate_up_proj)), gradient)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert 0 < graphs <= 2, graphs


def test_layers_compiled_one_by_one(ranks):
    ranks(2).run(check_compiled_one_by_one)


def check_outer_checkpoint(rank, world_size):
    """The recomputation of a checkpoint around the module drops again, and counts nothing."""
    mesh = init_device_mesh("cpu", (world_size,))
    counts = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = expert_parallel(Experts(EXPERTS, HIDDEN, INTERMEDIATE), mesh, capacity_factor=0.25)
        hidden, ids, weights = draw(rank)
        hidden.requires_grad_()
        if is_checkpointed:
            output = checkpoint(model, hidden, ids, weights, use_reentrant=False)
        else:
            output = model(hidden, ids, weights)
        output.sum().backward()
        counts.append(dropped_slots(model)[""].item())
    assert counts[0] > 0
    assert counts[0] == counts[1]


def test_dropped_slots_under_a_checkpoint(ranks):
    ranks(2).run(check_outer_checkpoint)


def check_keywords(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    whole = Experts(EXPERTS, HIDDEN, INTERMEDIATE)
    model = expert_parallel(copy.deepcopy(whole), mesh)
    hidden, ids, weights = draw(rank)
    expected = whole(hidden, ids, weights)
    for names in (("topk_ids", "topk_weights"), ("top_k_index", "top_k_weights")):
        given = dict(zip(names, (ids, weights), strict=True))
        checks.assert_close(model(hidden_states=hidden, **given), expected)
        checks.assert_close(model(hidden, **dict(reversed(given.items()))), expected)
    with pytest.raises(TypeError, match="expected hidden_states, topk_ids and topk_weights"):
        model(hidden, ids)


def test_keywords(ranks):
    ranks(2).run(check_keywords)


class Switched(Experts):
    """Experts with switches that have their defaults in the class, and constants there."""

    factor = 1.0
    is_negative = False
    unit = 2.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs) * self.factor * type(self).unit
        output = output / self.__class__.unit * self.read()
        return -output if self.is_negative else output

    @classmethod
    def read(cls):
        return cls.unit


def check_defaults_of_a_class(rank, world_size, compiled):
    """A switch that has its default in the class holds for the experts of this rank, too."""
    experts: Any = Switched(EXPERTS, HIDDEN, INTERMEDIATE)
    whole = copy.deepcopy(experts.state_dict())
    expert_parallel(experts, init_device_mesh("cpu", (world_size,)))
    call = torch.compile(experts, fullgraph=True, backend="eager") if compiled else experts
    want = call(*draw(rank))
    experts.factor = 0.5
    assert torch.equal(call(*draw(rank)), want * 0.5)
    experts.is_negative = True
    assert torch.equal(call(*draw(rank)), -want * 0.5)
    # A copy follows the copy.
    other = copy.deepcopy(experts)
    other.factor = 2.0
    assert torch.equal(other(*draw(rank)), -want * 2)
    assert torch.equal(call(*draw(rank)), -want * 0.5)
    # Dynamo does not look whether a class has changed.
    del experts.factor, experts.is_negative
    Switched.is_negative, Switched.unit = True, 4.0
    assert torch.equal(experts(*draw(rank)), -want * 2)
    Switched.is_negative, Switched.unit = False, 2.0
    # What was there before.
    early: Any = Switched(EXPERTS, HIDDEN, INTERMEDIATE)
    early.load_state_dict(whole)
    early.factor = 3.0
    expert_parallel(early, init_device_mesh("cpu", (world_size,)))
    checks.assert_close(early(*draw(rank)), want * 3)
    early = Experts(EXPERTS, HIDDEN, INTERMEDIATE)
    early.forward = early.forward
    with pytest.raises(ValueError, match="the methods of its class, got one with its own forward"):
        expert_parallel(early, init_device_mesh("cpu", (world_size,)))


@pytest.mark.parametrize("compiled", [False, True])
def test_defaults_of_a_class(ranks, compiled):
    ranks(2).run(check_defaults_of_a_class, compiled=compiled)


def check_world_of_one(rank, world_size):
    """The limits hold on one rank as on several."""
    mesh = init_device_mesh("cpu", (1,))
    whole = Experts(EXPERTS, HIDDEN, INTERMEDIATE)
    model = expert_parallel(copy.deepcopy(whole), mesh, max_tokens_per_rank=5)
    with pytest.raises(ValueError, match=r"at most max_tokens_per_rank \(5\) tokens, got 6"):
        model(*draw(rank))
    model = expert_parallel(copy.deepcopy(whole), mesh, capacity_factor=0.25)
    output = model(*draw(rank))
    # Three tokens of two slots each have room.
    checks.assert_close(output[:3], whole(*draw(rank))[:3])
    assert output[3:].eq(0).all()
    assert dropped_slots(model)[""].item() == 6


def test_limits_in_a_world_of_one(ranks):
    ranks(1).run(check_world_of_one)


@pytest.mark.parametrize("name", ["max_tokens_per_rank", "capacity_factor"])
def test_limits_that_are_none(name):
    for value, error in ((0, ValueError), (-1, ValueError), ("8", TypeError)):
        with pytest.raises(error, match=f"ExpertParallel: expected {name} "):
            ExpertParallel(**{name: value})  # type: ignore[arg-type]


def test_numbers_of_another_kind():
    with pytest.raises(TypeError, match=r"max_tokens_per_rank to be an int or None, got 8\.5"):
        ExpertParallel(max_tokens_per_rank=8.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_factor > 0 and finite"):
        ExpertParallel(capacity_factor=float("inf"))
