# SPDX-License-Identifier: Apache-2.0
"""The plan of expert parallelism's transport, on ranks that are made up; groups and their values."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import distributed

from moe_ops._core import transport
from moe_ops._core.transport import ENVIRONMENT_VARIABLE, OfGroups, Plan, Rank, plan

GPUS = ("a", "b", "c", "d")


def on_one_host(world_size=4):
    return tuple(
        Rank("host", "cuda", gpu, GPUS, tuple(other for other in GPUS if other != gpu))
        for gpu in GPUS[:world_size]
    )


def changed(index, **values):
    ranks = list(on_one_host())
    ranks[index] = replace(ranks[index], **values)
    return tuple(ranks)


def unasked():
    raise AssertionError("nothing depends on where the ranks run")


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_a_world_of_one_keeps_its_rows(monkeypatch):
    for wish in (None, "functional", "symmetric"):
        if wish:
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, wish)
        assert plan(1, unasked, True).transport == "none"


def test_the_default_is_symmetric_where_it_can_be_had():
    assert plan(4, on_one_host, True) == Plan("symmetric", "all GPUs access each other")
    reason = "only Triton kernels on CUDA GPUs push rows"
    assert plan(4, unasked, False) == Plan("functional", reason)


def test_wishes(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "symmetric")
    reason = f"asked for by {ENVIRONMENT_VARIABLE}"
    assert plan(4, on_one_host, True) == Plan("symmetric", reason)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "functional")
    assert plan(4, unasked, True) == Plan("functional", reason)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "pigeons")
    with pytest.raises(RuntimeError, match="to be functional or symmetric, got pigeons"):
        plan(4, unasked, True)


@pytest.mark.parametrize(
    ("ranks", "obstacle"),
    [
        (changed(2, device_type="cpu"), "the tensors of rank 2 are on cpu, not on a CUDA GPU"),
        (changed(1, host="other"), "rank 1 is on other and rank 0 on host"),
        (changed(3, gpu="a"), "ranks 0 and 3 share a GPU"),
        (changed(3, reaches=("a", "c")), "the GPUs of ranks 1 and 3 do not access each other"),
        (changed(0, reaches=("b",)), "the GPUs of ranks 0 and 2 do not access each other"),
        # Schedulers show each process its own GPU alone.
        (changed(1, sees=("b",), reaches=()), "rank 1 does not see the GPU of rank 0: let each"),
        (changed(0, has_symmetric_memory=False), "torch of rank 0 has no symmetric memory"),
    ],
)
def test_what_keeps_ranks_from_pushing(ranks, obstacle, monkeypatch):
    found = plan(4, lambda: ranks, True)
    assert found.transport == "functional"
    assert obstacle in found.reason
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "symmetric")
    with pytest.raises(RuntimeError, match=f"=symmetric: .*{obstacle}.*; use functional"):
        plan(4, lambda: ranks, True)


def test_an_implementation_that_cannot_push(monkeypatch):
    assert plan(4, unasked, False).transport == "functional"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "symmetric")
    with pytest.raises(RuntimeError, match="only Triton kernels on CUDA GPUs push rows"):
        plan(4, unasked, False)
    with pytest.raises(RuntimeError, match="only Triton kernels on CUDA GPUs push rows"):
        transport.exchange("ep_combine", torch.ones(2, 1), 2, "")


@pytest.fixture
def new_group(tmp_path):
    """Return a function that makes the default process group anew, of one rank."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    made: list[None] = []

    def make():
        if distributed.is_initialized():
            distributed.destroy_process_group()
        made.append(None)
        store = f"file://{tmp_path}/{len(made)}"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        group = distributed.group.WORLD
        assert group is not None
        return group.group_name

    yield make
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_a_group_that_is_made_again_has_a_value_of_its_own(new_group):
    values: OfGroups[object] = OfGroups()
    name = new_group()
    first = values.get(name, lambda group: object())
    assert values.get(name, lambda group: object()) is first
    assert new_group() == name
    second = values.get(name, lambda group: object())
    assert second is not first
    gc.collect()
    # The first group's end takes nothing of the second.
    assert values.get(name, lambda group: object()) is second
    assert len(values) == 1


def test_a_value_goes_with_its_group(new_group):
    values: OfGroups[object] = OfGroups()
    values.get(new_group(), lambda group: object())
    distributed.destroy_process_group()
    gc.collect()
    assert len(values) == 0


def test_ranks_tell_where_they_run(new_group):
    (rank,) = transport.ranks_of(new_group(), torch.device("cpu"))
    assert rank.device_type == "cpu"
    assert rank.host
    assert "on cpu" in transport.why_not_symmetric((rank,))


def test_a_plan_is_made_and_logged_once_for_a_group(new_group, monkeypatch, caplog):
    name, cpu = new_group(), torch.device("cpu")

    def planned():
        return transport.plan_of(2, name, cpu, can_push=False)

    with caplog.at_level("INFO", "moe_ops"):
        first = planned()
        assert planned() is first
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "functional")
        assert planned().reason == f"asked for by {ENVIRONMENT_VARIABLE}"
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"moe_ops: process group {name} exchanges rows on cpu by the functional transport: {reason}"
        for reason in (first.reason, f"asked for by {ENVIRONMENT_VARIABLE}")
    ]
