# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism under FSDP2, clipping, and checkpoints of torch.distributed.checkpoint."""

import copy
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe_ops.distributed import clip_grad_norm_, expert_parallel
from moe_ops.layers import Experts, MoE, Router
from testing import checks
from testing.ep_problem import HIDDEN, INTERMEDIATE, TOP_K, grad_of, problem, summed

pytestmark = pytest.mark.slow

EXPERTS = 8


class Model(nn.Module):
    """Two MoE layers with a norm before each."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN, dtype=dtype) for _ in range(2))
        self.layers = nn.ModuleList(
            MoE(Router(HIDDEN, EXPERTS, TOP_K, dtype=dtype),
                Experts(EXPERTS, HIDDEN, INTERMEDIATE, bias=True, dtype=dtype))
            for _ in range(2)
        )  # fmt: skip

    def forward(self, hidden):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + layer(norm(hidden))[0]
        return hidden


def loss_of(model, hidden, tangent):
    return (model(hidden) * tangent).sum()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meshes():
    """Return the 2 x 2 mesh, and one dimension of all ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    return mesh, init_device_mesh("cpu", (4,))


def shard(model, mesh, everyone, **options):
    """Spread the experts, and shard their parts over "fsdp", all else over all ranks."""
    expert_parallel(model, mesh["ep"], **options)
    for layer in model.layers:
        fully_shard(layer.experts, mesh=mesh["fsdp"])
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone)


def check_fsdp(rank, world_size, how):
    whole = Model()
    given = problem(rank, [5] * 4, EXPERTS)
    loss_of(whole, given.hidden, given.tangent).backward()
    mesh, everyone = meshes()
    model = shard(copy.deepcopy(whole), mesh, everyone, keep_rows=how == "kept")
    if how == "compiled":
        for layer in model.layers:
            # FSDP2's hooks stand around it.
            layer.experts.forward = torch.compile(
                layer.experts.forward, backend="aot_eager", fullgraph=True
            )
    for turn in range(2):
        # Gradients accumulate: the second is added to the first.
        loss_of(model, given.hidden[given.own], given.tangent[given.own]).backward()
        for (name, one), two in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(one, DTensor), name
            assert one.device_mesh.ndim == (2 if "experts" in name else 1), name
            checks.assert_close(full(grad_of(one)), (turn + 1) * grad_of(two) / 4, what=name)
    for parameter in whole.parameters():
        grad_of(parameter).div_(2)
    norm = clip_grad_norm_(model.parameters(), 1e-3)
    checks.assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 1e-3))
    for one, two in zip(model.parameters(), whole.parameters(), strict=True):
        checks.assert_close(full(grad_of(one)), grad_of(two))


@pytest.mark.parametrize("how", ["eager", "kept", "compiled"])
def test_all_gradients_are_means_under_fsdp(ranks, how):
    ranks(4).run(check_fsdp, how=how)


class Shared(Experts):
    """Experts that share a parameter, as those with a learned activation do."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.factor = nn.Parameter(torch.ones(HIDDEN, dtype=options["dtype"]))

    def forward(self, hidden_states, topk_ids, topk_weights):
        return super().forward(hidden_states * self.factor, topk_ids, topk_weights)


def check_shared_parameters(rank, world_size):
    """Without FSDP2 its gradient is a sum over the ranks. Under it, it has to be frozen."""
    whole: Any = Model()
    given = problem(rank, [5] * 4, EXPERTS)
    for layer in whole.layers:
        layer.experts = Shared(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.float64)
    loss_of(whole, given.hidden, given.tangent).backward()
    mesh, everyone = meshes()
    alone: Any = expert_parallel(copy.deepcopy(whole), init_device_mesh("cpu", (4,)))
    loss_of(alone, given.hidden[given.own], given.tangent[given.own]).backward()
    for one, two in zip(alone.layers, whole.layers, strict=True):
        gradient = grad_of(one.experts.factor)
        distributed.all_reduce(gradient)
        checks.assert_close(gradient, grad_of(two.experts.factor))
    model = shard(copy.deepcopy(whole), mesh, everyone)
    with pytest.raises(
        ValueError, match=r"expected factor of FSDPShared to be frozen under fully_shard"
    ):
        model(given.hidden[given.own])


def test_parameters_that_all_experts_share(ranks):
    ranks(4).run(check_shared_parameters)


def check_own_factor(rank, world_size):
    """Whoever has set the divisor keeps it."""
    whole, given = Model(), problem(rank, [5] * 4, EXPERTS)
    loss_of(whole, given.hidden, given.tangent).backward()
    mesh, everyone = meshes()
    model = shard(copy.deepcopy(whole), mesh, everyone)
    for layer in model.layers:
        layer.experts.set_gradient_divide_factor(4)
    loss_of(model, given.hidden[given.own], given.tangent[given.own]).backward()
    for one, two in zip(model.parameters(), whole.parameters(), strict=True):
        checks.assert_close(full(grad_of(one)), grad_of(two) / 4)


def test_a_divisor_that_was_set_stays(ranks):
    ranks(4).run(check_own_factor)


def check_mixed_precision(rank, world_size):
    """Experts that FSDP2 gathers in bf16 compute in bf16, and keep their gradients in fp32."""
    whole, given = Model(torch.float32), problem(rank, [5] * 4, EXPERTS, dtype=torch.float32)
    loss_of(whole, given.hidden, given.tangent).backward()
    mesh, everyone = meshes()
    model = copy.deepcopy(whole)
    expert_parallel(model, mesh["ep"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer.get_submodule("experts"), mesh=mesh["fsdp"], mp_policy=policy)
    fully_shard(model, mesh=everyone)
    loss_of(model, given.hidden[given.own], given.tangent[given.own]).backward()
    for (name, one), two in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert grad_of(one).dtype == torch.float32
        error = (full(grad_of(one)) - grad_of(two) / 4).norm() / (grad_of(two) / 4).norm()
        assert error < 0.05, name


def test_mixed_precision(ranks):
    ranks(4).run(check_mixed_precision)


def check_clip(rank, world_size):
    """Sharded and plain gradients have one norm, that of one process."""
    whole, given = Model(), problem(rank, [5] * world_size, EXPERTS)
    loss_of(whole, given.hidden, given.tangent).backward()
    mesh = init_device_mesh("cpu", (world_size,))
    for norm_type, max_norm in (
        (2.0, 0.1),
        (float("inf"), 0.01),
        (1.0, 1.0),
        (0.0, 1.0),
        (2.0, 1e9),
    ):
        model = expert_parallel(copy.deepcopy(whole), mesh)
        loss_of(model, given.hidden[given.own], given.tangent[given.own]).backward()
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                distributed.all_reduce(parameter.grad)
        expected = copy.deepcopy(whole)
        for one, two in zip(expected.parameters(), whole.parameters(), strict=True):
            one.grad = grad_of(two).clone()
        want = nn.utils.clip_grad_norm_(expected.parameters(), max_norm, norm_type)
        got = clip_grad_norm_(model.parameters(), max_norm, norm_type)
        checks.assert_close(got, want)
        for one, two in zip(model.parameters(), expected.parameters(), strict=True):
            checks.assert_close(full(grad_of(one)), grad_of(two))
    assert clip_grad_norm_([], 1.0).item() == 0
    grad_of(next(model.parameters())).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="a finite total norm, got nan"):
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


def test_clip_grad_norm(ranks):
    ranks(2).run(check_clip)


def train(model, optimizer, rank, world_size, steps):
    """Take steps on the same batch of 8 tokens, however many ranks share it."""
    losses = []
    for step in steps:
        given = problem(rank, [8 // world_size] * world_size, EXPERTS, seed=step)
        loss = loss_of(model, given.hidden[given.own], given.tangent[given.own])
        loss.backward()
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                distributed.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed(loss.detach()))
    return torch.stack(losses)


def check_save(rank, world_size, folder):
    model = expert_parallel(Model(), init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    train(model, optimizer, rank, world_size, range(3))
    states: Any = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(states, checkpoint_id=f"{folder}/state")
    losses = train(model, optimizer, rank, world_size, range(3, 6))
    if rank == 0:
        torch.save(losses, f"{folder}/losses")


def check_resume(rank, world_size, folder):
    torch.manual_seed(1)
    model = expert_parallel(Model(), init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    states: Any = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    load(states, checkpoint_id=f"{folder}/state")
    set_state_dict(
        model, optimizer,
        model_state_dict=states["model"], optim_state_dict=states["optimizer"],
    )  # fmt: skip
    losses = train(model, optimizer, rank, world_size, range(3, 6))
    checks.assert_close(losses, torch.load(f"{folder}/losses"))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 2)])
def test_resumes_on_another_number_of_ranks(ranks, tmp_path, before, after):
    ranks(before).run(check_save, folder=str(tmp_path))
    ranks(after).run(check_resume, folder=str(tmp_path))
