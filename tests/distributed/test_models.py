# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, LoRA and quantised weights under expert parallelism, and without it."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_ops import quantize_weight
from moe_ops.distributed import dropped_slots, expert_parallel
from moe_ops.layers import Experts
from moe_ops.layers.lora import LoraExperts
from testing import checks
from testing.ep_problem import (
    HIDDEN,
    INTERMEDIATE,
    assert_equals_one_process,
    parallel_copy,
    problem,
    summed,
)

pytestmark = pytest.mark.slow

EXPERTS = 8
BATCH, LENGTH = 4, 6


def mesh_of(world_size):
    return init_device_mesh("cpu", (world_size,))


def lora(**options):
    layer = LoraExperts(
        Experts(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.float64, **options), rank=3
    )
    for name in layer.adapters:
        nn.init.normal_(layer.adapters[name].get_parameter("lora_B"))
    return layer


def check_lora(rank, world_size):
    mesh = mesh_of(world_size)
    whole = lora(bias=True)
    parallel = parallel_copy(whole, mesh)
    assert all(isinstance(p, DTensor) for p in parallel.parameters())
    given = problem(rank, [6] * world_size, EXPERTS)
    assert_equals_one_process(whole, parallel, given)
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    assert_equals_one_process(whole, parallel, given, call=compiled)


def test_lora_experts(ranks):
    ranks(2).run(check_lora)


def check_lora_dropout(rank, world_size):
    """The same elements are dropped when the experts are computed again for the backward."""
    mesh = mesh_of(world_size)
    layer = lora()
    layer.lora_dropout = 0.5
    given = problem(rank, [6] * world_size, EXPERTS)
    found = []
    for keep_rows in (False, True):
        parallel = parallel_copy(layer, mesh, keep_rows=keep_rows)
        torch.manual_seed(rank)
        hidden, ids, weights = given.of_rank()
        output = parallel(hidden, ids, weights)
        leaves = [p for p in parallel.parameters() if p.requires_grad]
        grads = torch.autograd.grad(output, [hidden, *leaves], given.tangent[given.own])
        found.append([output, *(g.to_local() if isinstance(g, DTensor) else g for g in grads)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_dropout_of_lora(ranks):
    ranks(2).run(check_lora_dropout)


def check_fp8(rank, world_size):
    whole = Experts(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.float32).quantize_fp8_()
    given = problem(rank, [6] * world_size, EXPERTS, dtype=torch.float32)
    for layer in (whole, LoraExperts(whole, rank=2, dtype=torch.float32)):
        parallel = parallel_copy(layer, mesh_of(world_size))
        assert_equals_one_process(layer, parallel, given)


def test_fp8_weights(ranks):
    ranks(2).run(check_fp8)


def check_quantised(rank, world_size):
    for format in ("nf4", "mxfp4", "int4", "fp8_block"):
        whole = Experts(EXPERTS, 64, 64, dtype=torch.float32)
        for name in ("gate_up_proj", "down_proj"):
            weight = quantize_weight(getattr(whole, name).detach(), format)
            delattr(whole, name)
            setattr(whole, name, weight)
        parallel = parallel_copy(whole, mesh_of(world_size))
        codes = dict(parallel.named_parameters())["gate_up_proj.codes"]
        assert isinstance(codes, DTensor)
        assert codes.to_local().shape[0] == EXPERTS // world_size
        given = problem(rank, [6] * world_size, EXPERTS, dtype=torch.float32)
        given.hidden, given.tangent = (torch.cat([t] * 4, 1) for t in (given.hidden, given.tangent))
        assert_equals_one_process(whole, parallel, given)


def test_quantised_weights(ranks):
    ranks(2).run(check_quantised)


def tiny_model(name, dtype=torch.float64):
    from moe_ops.integrations.transformers import register
    from testing.tiny_models import make_model

    register()
    model = make_model(name, dtype)
    model.set_experts_implementation("moe_ops")
    return model


def model_step(model, rank, world_size):
    """Return the logits and the loss, which all ranks' losses sum up to, of this rank's batch."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (BATCH, LENGTH), generator=generator)
    share = BATCH // world_size
    logits = model(input_ids=tokens[rank * share : (rank + 1) * share], use_cache=False).logits
    return logits, logits.double().square().sum() / BATCH


def assert_same_gradients(parallel, whole, dtype=None):
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    mine = dict(parallel.named_parameters())
    assert list(mine) == list(dict(whole.named_parameters()))
    for name, parameter in trained.items():
        assert (parameter.grad is None) == (mine[name].grad is None), name
        if parameter.grad is not None:
            checks.assert_close(summed(mine[name].grad), parameter.grad, dtype=dtype, what=name)


def check_model(rank, world_size, name):
    whole = tiny_model(name)
    want, loss = model_step(whole, 0, 1)
    loss.backward()
    parallel = expert_parallel(copy.deepcopy(whole), mesh_of(world_size))
    assert dropped_slots(parallel)
    got, loss = model_step(parallel, rank, world_size)
    share = BATCH // world_size
    checks.assert_close(got, want[rank * share : (rank + 1) * share])
    loss.backward()
    # Some routers compute in fp32, whatever the model's dtype is.
    assert_same_gradients(parallel, whole, torch.float32 if name == "nemotron_h" else None)


@pytest.mark.parametrize(
    ("world_size", "name"), [(2, "qwen3_moe"), (2, "gpt_oss"), (4, "mixtral"), (2, "nemotron_h")]
)
def test_models_of_transformers(ranks, world_size, name):
    pytest.importorskip("transformers")
    ranks(world_size).run(check_model, name=name)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def peft_model(dtype=torch.float64):
    """Return a model with LoRA adapters on its experts whose lora_B is not zero."""
    from testing.peft_problem import split_model

    tiny_model("qwen3_moe")
    torch.manual_seed(0)
    return split_model("qwen3_moe", dtype)


def check_peft(rank, world_size):
    whole = peft_model()
    want, loss = model_step(whole, 0, 1)
    loss.backward()
    log = Warnings()
    logging.getLogger("moe_ops").addHandler(log)
    parallel = expert_parallel(copy.deepcopy(whole), mesh_of(world_size))
    got, loss = model_step(parallel, rank, world_size)
    share = BATCH // world_size
    checks.assert_close(got, want[rank * share : (rank + 1) * share])
    loss.backward()
    assert_same_gradients(parallel, whole)
    adapters = [n for n, p in parallel.named_parameters() if "lora_" in n]
    assert len(adapters) == 4
    state: Any = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        for name, parameter in whole.named_parameters():
            assert torch.equal(state[name], parameter), name
    assert not [text for text in log.texts if "merges" in text]
    logging.getLogger("moe_ops").removeHandler(log)


def two_adapters(format=None):
    """Return a model with two adapters on its experts, of which the first has a name of its own."""
    import peft

    from moe_ops.integrations import peft as moe_ops_peft
    from moe_ops.integrations.transformers import quantize_experts_
    from testing.peft_problem import config

    torch.manual_seed(0)
    model = tiny_model("qwen3_moe", torch.float32)
    model.set_experts_implementation("moe_ops")
    if format is not None:
        quantize_experts_(model, format)
    model = peft.get_peft_model(model, config(), adapter_name="policy")
    model.add_adapter("other", config(r=4))
    moe_ops_peft.enable(model)
    return model


def check_peft_switches(rank, world_size, format):
    """What PEFT activates, switches off or merges holds for experts that are spread, too."""
    whole: Any = two_adapters(format)
    parallel: Any = expert_parallel(copy.deepcopy(whole), mesh_of(world_size))
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    seen: list[torch.Tensor] = []

    def compare():
        with torch.no_grad():
            want, got = model_step(whole, 0, 1)[0], model_step(parallel, rank, world_size)[0]
        checks.assert_close(got, want[share])
        assert not any(torch.equal(want, other) for other in seen)
        seen.append(want)

    compare()
    with whole.disable_adapter(), parallel.disable_adapter():
        compare()
    for names in ("other", ["policy", "other"]):
        for model in (whole, parallel):
            model.base_model.set_adapter(names)
        compare()
    if format is None:
        seen.clear()
        compare()
        for model in (whole, parallel):
            model.merge_adapter()
        with torch.no_grad():
            got = model_step(parallel, rank, world_size)[0]
        checks.assert_close(got, seen[0][share])
        with parallel.disable_adapter(), whole.disable_adapter():
            compare()
    parallel.add_adapter("late", two_adapters().peft_config["other"])
    expected = r"that it had at expert_parallel \(policy, other\), got others \(.*, late\); add"
    with pytest.raises(ValueError, match=expected):
        model_step(parallel, rank, world_size)
    # Of the same names, but other modules.
    for name in ("late", "other"):
        parallel.delete_adapter(name)
    parallel.add_adapter("other", two_adapters().peft_config["other"])
    with pytest.raises(ValueError, match=r"expert_parallel \(policy, other\), got others"):
        model_step(parallel, rank, world_size)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_peft_switches(ranks, format):
    pytest.importorskip("peft")
    ranks(2).run(check_peft_switches, format=format)


def check_assigned_tensors(rank, world_size, what):
    """Plain tensors in the place of shards are refused, and set_model_state_dict shards them."""
    mesh = mesh_of(world_size)
    hidden, ids, weights = problem(rank, [4, 4], EXPERTS, dtype=torch.float32).of_rank()
    if what == "peft":
        whole: Any = two_adapters()
        call = lambda model: model_step(model, rank, world_size)[0]  # noqa: E731
    else:
        whole = Experts(EXPERTS, HIDDEN, INTERMEDIATE)
        if what == "nf4":
            whole.quantize_("nf4")
        call = lambda model: model(hidden, ids, weights)  # noqa: E731
    state = copy.deepcopy(whole.state_dict())
    adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}
    parallel: Any = expert_parallel(copy.deepcopy(whole), mesh)
    want = call(parallel)
    for given in [state] if what != "peft" else [state, adapters]:
        wrong: Any = copy.deepcopy(parallel)
        wrong.load_state_dict(given, assign=True, strict=given is state)
        with pytest.raises(TypeError, match=r"that expert_parallel made, got .*set_model_state_"):
            call(wrong)
    for parameter in parallel.parameters():
        parameter.detach().zero_()
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(parallel, state, options=options)
    assert torch.equal(call(parallel), want)


@pytest.mark.parametrize("what", ["plain", "nf4", "peft"])
def test_assigned_tensors(ranks, what):
    if what == "peft":
        pytest.importorskip("peft")
    ranks(2).run(check_assigned_tensors, what=what)


def check_peft_trains_an_adapter_of_another_name(rank, world_size):
    whole = two_adapters()
    parallel = expert_parallel(copy.deepcopy(whole), mesh_of(world_size))
    for _, loss in (model_step(whole, 0, 1), model_step(parallel, rank, world_size)):
        loss.backward()
    assert_same_gradients(parallel, whole)
    found = {n for n, p in parallel.named_parameters() if p.grad is not None}
    assert len([n for n in found if ".policy." in n]) == 4
    assert not [n for n in found if ".other." in n]


def test_peft_trains_an_adapter_of_another_name(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_peft_trains_an_adapter_of_another_name)


def check_peft_compiled_one_by_one(rank, world_size):
    """More models than torch.compile compiles anew share one graph."""
    mesh = mesh_of(world_size)
    wrappers: list[Any] = [
        expert_parallel(two_adapters(), mesh).get_submodule(
            "base_model.model.model.layers.0.mlp.experts"
        )
        for _ in range(10)
    ]
    experts = wrappers[0].get_base_layer()
    hidden = torch.randn(6, experts.hidden_dim, requires_grad=True)
    weights, ids = torch.rand(6, experts.num_experts).topk(2)
    torch._dynamo.utils.counters.clear()
    for wrapper in wrappers:
        want = wrapper(hidden, ids, weights)
        wrapper.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(wrapper(hidden, ids, weights), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_peft_compiled_one_by_one(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_peft_compiled_one_by_one)


def check_refuses_adapters_that_are_merged(rank, world_size):
    from testing.peft_problem import wrapped_model

    tiny_model("qwen3_moe")
    model = wrapped_model("qwen3_moe", torch.float32)
    expected = r"call moe_ops\.integrations\.peft\.enable\(model\) first"
    with pytest.raises(ValueError, match=expected):
        expert_parallel(model, mesh_of(world_size))


def check_refuses_adapters_on_biases(rank, world_size):
    """They have no dimension of experts. The model stays as it was."""
    import peft

    from moe_ops.integrations import peft as moe_ops_peft

    names = [f"mlp.experts.{name}" for name in ("down_proj", "down_proj_bias")]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=names)
    model = peft.get_peft_model(tiny_model("gpt_oss"), config)
    moe_ops_peft.enable(model)
    with pytest.raises(
        ValueError, match=r"adapters on gate_up_proj, .*, got some on down_proj_bias"
    ):
        expert_parallel(model, mesh_of(world_size))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_refuses_adapters_on_biases(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_refuses_adapters_on_biases)


def check_peft_enabled_again(rank, world_size):
    """enable() says that the adapters are computed beside the experts, as they are."""
    from moe_ops.integrations import peft as moe_ops_peft

    model = two_adapters()
    names = moe_ops_peft.enable(model)
    assert names
    assert moe_ops_peft.enable(expert_parallel(model, mesh_of(world_size))) == names


def test_peft_enabled_again(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_peft_enabled_again)


def test_refuses_adapters_that_are_merged(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_refuses_adapters_that_are_merged)


def test_peft(ranks):
    pytest.importorskip("peft")
    ranks(2).run(check_peft)


def check_refuses_other_implementations(rank, world_size):
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match=r'set_experts_implementation\("moe_ops"\)'):
        expert_parallel(model, mesh_of(world_size))


def test_refuses_other_implementations(ranks):
    pytest.importorskip("transformers")
    ranks(2).run(check_refuses_other_implementations)


def check_dtensors(rank, world_size):
    """DTensors that reach an op get one error, which names ExpertParallel, with and without a gradient."""
    mesh, layer = mesh_of(world_size), Experts(EXPERTS, HIDDEN, INTERMEDIATE)
    expert_parallel(layer, mesh)
    hidden, ids, weights = problem(rank, [4, 4], EXPERTS, dtype=torch.float32).of_rank()
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"moe::fused_experts: .*a DTensor for gate_up_proj; .*ExpertParallel"
        ):
            type(layer).forward(layer, hidden, ids, weights)
        layer.requires_grad_(False)
        hidden, weights = hidden.detach(), weights.detach()
    every = [DTensor.from_local(t, mesh, run_check=False) for t in (hidden, torch.arange(4))]
    with pytest.raises(TypeError, match=r"a DTensor for input; .*ExpertParallel"):
        torch.ops.moe.permute(*every, 1)


def test_dtensors_without_expert_parallelism(ranks):
    ranks(2).run(check_dtensors)


# FSDP2 without expert parallelism: peft#3080 is what people run into.


def check_fsdp(rank, world_size, trains, compiles):
    """Gradients under fully_shard are those of one process, and adapters stay on split LoRA."""
    whole = (
        peft_model(torch.float32) if trains == "lora" else tiny_model("qwen3_moe", torch.float32)
    )
    _, loss = model_step(whole, 0, 1)
    loss.backward()
    log = Warnings()
    logging.getLogger("moe_ops").addHandler(log)
    model = copy.deepcopy(whole)
    model.zero_grad()
    mesh = mesh_of(world_size)
    layers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeDecoderLayer"]
    assert layers
    for layer in layers:
        if compiles:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _, loss = model_step(model, rank, world_size)
    loss.backward()
    mine = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            got = mine[name].grad
            assert isinstance(got, DTensor)
            checks.assert_close(got.full_tensor(), parameter.grad / world_size, what=name)
    assert not [text for text in log.texts if "merges" in text]
    logging.getLogger("moe_ops").removeHandler(log)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("trains", ["all", "lora"])
def test_fsdp_without_expert_parallelism(ranks, trains, compiles):
    pytest.importorskip("peft")
    ranks(2).run(check_fsdp, trains=trains, compiles=compiles)
