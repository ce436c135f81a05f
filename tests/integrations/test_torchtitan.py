# SPDX-License-Identifier: Apache-2.0
"""torchtitan's own debug models train through moe ops, with torchtitan's numbers.

Only torchtitan's models are imported. Its Trainer asks for an accelerator. torchtitan is imported in
a fixture: that takes seconds, and turns FakeTensorMode.__init__ into a function that dynamo skips.
"""

import copy
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from testing.pages import DOCS, run_python_blocks
from testing.ranks import all_ranks
from testing.recorders import MoeOps
from testing.tolerances import MODULE_NORM, relative_error

ROOT = Path(__file__).parents[2]
OVERRIDE = "moe_ops.integrations.torchtitan.fused_experts"
EXPERTS = "moe.routed_experts.inner_experts"
BF16 = MODULE_NORM[torch.bfloat16]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed():
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed (docs/torchtitan.md says how)")


@pytest.fixture(scope="module")
def titan(installed):
    """Return what the tests use of torchtitan."""
    from torchtitan.config import CompileConfig
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.models import deepseek_v3, gpt_oss, qwen3
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import GroupedExperts

    return SimpleNamespace(
        models={"deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "qwen3": qwen3},
        override=lambda config, *imports: apply_overrides(OverrideConfig(imports=imports), config),
        compile_blocks=lambda model: apply_compile(
            model,
            compile_config=CompileConfig(enable=True, backend="aot_eager"),
            parallel_dims=SimpleNamespace(tp_enabled=False),
        ),
        SelectiveAC=SelectiveAC,
        ScaledDotProductAttention=ScaledDotProductAttention,
        GroupedExperts=GroupedExperts,
    )


def debug_config(titan, model, imports=()):
    """Return torchtitan's debug model, cut down to its first MoE layer, with overrides applied.

    Both models then route alike: nothing that differs stands before the router.
    """
    flavor = "debugmodel_moe" if model == "qwen3" else "debugmodel"
    config = titan.models[model].model_registry(flavor).model
    first = next(index for index, layer in enumerate(config.layers) if layer.moe is not None)
    config.layers = config.layers[: first + 1]
    for layer in config.layers:  # FlexAttention has no backward on a CPU.
        layer.attention.inner_attention = titan.ScaledDotProductAttention.Config()
    titan.override(config, *imports)
    return config


def build_pair(titan, model, imports=(OVERRIDE,), dtype=torch.float32):
    """Return torchtitan's model and the one with the override, with the same parameters."""
    torch.manual_seed(0)
    theirs = debug_config(titan, model).build()
    ours = debug_config(titan, model, imports).build()
    for built in (theirs, ours):
        built.init_states()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if EXPERTS in name:  # At their own size the experts hardly count.
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    ours.load_state_dict(theirs.state_dict())
    for built in (theirs, ours):
        for parameter in built.parameters():  # As FSDP's mixed precision casts them; no buffers.
            parameter.data = parameter.data.to(dtype)
    return theirs, ours


def run_step(model):
    """Return the logits, and every gradient under torchtitan's names for the stock experts."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (2, 32), generator=generator)
    labels = torch.randint(0, model.config.vocab_size, (2, 32), generator=generator)
    model.zero_grad()
    logits = model(tokens, torch.arange(32).expand(2, 32))
    F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), **stock_names(gradients)}


def stock_names(tensors):
    """Return tensors by name with each w13 split into w1_EFD and w3_EFD."""
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(".w13"):
            named[name.replace("w13", "w1_EFD")], named[name.replace("w13", "w3_EFD")] = (
                tensor.unbind(2)
            )
        else:
            named[name] = tensor
    return named


def assert_close(actual, expected, tolerance=BF16):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert value.norm() > 0, f"{name} is zero in torchtitan: the comparison says nothing"
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
        assert actual[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3"])
def test_a_step_equals_torchtitans(titan, model, dtype):
    theirs, ours = build_pair(titan, model, dtype=dtype)
    with MoeOps() as ops:
        expected = run_step(theirs)
    assert ops.names == []
    with MoeOps() as ops:
        actual = run_step(ours)
    assert ops.names == [
        "fused_experts_forward", "fused_experts_down_backward", "fused_experts_up_backward",
    ]  # fmt: skip
    assert_close(actual, expected)
    counted = [dict(built.named_buffers()) for built in (theirs, ours)]
    assert counted[0].keys() == counted[1].keys()
    for name, value in counted[0].items():
        assert torch.equal(counted[1][name], value), name


def exact_experts(layer, x, scores, ids, tangent):
    """Return output and gradients of stock experts, in fp64 on their weights in bf16."""
    leaves = [tensor.double().requires_grad_() for tensor in (x.bfloat16(), scores)]
    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    weights = [getattr(layer.inner_experts, name).bfloat16().double() for name in names]
    w1, w2, w3 = (weight.detach().requires_grad_() for weight in weights)
    tokens, slots = leaves[0].flatten(0, 1), leaves[1].flatten(0, 1)
    output = torch.zeros_like(tokens)
    for expert in range(len(w1)):
        token, slot = torch.where(ids.flatten(0, 1) == expert)
        rows = F.silu(tokens[token] @ w1[expert].T) * (tokens[token] @ w3[expert].T) @ w2[expert].T
        output = output.index_add(0, token, rows * slots[token, slot, None])
    wanted = [*leaves, w1, w2, w3]
    gradients = torch.autograd.grad(output.view_as(x), wanted, tangent.double())
    return output.view_as(x).detach(), dict(zip(("x", "scores", *names), gradients, strict=True))


def run_experts(layer, x, scores, ids, tangent):
    """Return the output of RoutedExperts, and gradients under the stock names."""
    x, scores = (tensor.detach().requires_grad_() for tensor in (x, scores))
    counts = torch.bincount(ids.flatten(), minlength=layer.inner_experts.num_experts)
    output = layer(x, scores, ids, counts)
    wanted = {"x": x, "scores": scores, **dict(layer.inner_experts.named_parameters(prefix="."))}
    gradients = torch.autograd.grad(output, list(wanted.values()), tangent)
    named = stock_names(dict(zip(wanted, gradients, strict=True)))
    return output.detach(), {name.lstrip("."): value for name, value in named.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
def test_routed_experts_are_as_accurate(titan, dtype, recompute):
    """Expert 2 has no token and expert 4 has them all."""
    imports = [(OVERRIDE, {"recompute": recompute})]
    theirs, ours = (
        built.layers["1"].moe.routed_experts
        for built in build_pair(titan, "deepseek_v3", imports, dtype)
    )
    assert ours.recompute == recompute
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 20, 256, generator=generator)
    affinity = torch.rand(2, 20, 8, generator=generator)
    affinity[..., 2], affinity[..., 4] = -1.0, 2.0
    inputs = (
        x.to(dtype),
        torch.rand(2, 20, 3, generator=generator),
        affinity.topk(3).indices,
        torch.randn(2, 20, 256, generator=generator).to(dtype),
    )
    exact, exact_gradients = exact_experts(theirs, *inputs)
    with MoeOps() as ops:
        output, gradients = run_experts(ours, *inputs)
    strings = [argument for argument in ops.calls[0][1] if isinstance(argument, str)]
    assert ops.names[0] == "fused_experts_forward"
    assert ("pre_activation" in strings) == (recompute == "pre_activation")
    peer, peer_gradients = run_experts(theirs, *inputs)
    assert output.dtype == peer.dtype == dtype
    assert relative_error(output, exact) <= 1.25 * relative_error(peer, exact)
    assert gradients.keys() == peer_gradients.keys() == exact_gradients.keys()
    for name, value in exact_gradients.items():
        assert gradients[name].dtype == peer_gradients[name].dtype, name
        error, peer_error = (
            relative_error(found[name], value) for found in (gradients, peer_gradients)
        )
        assert error <= 1.25 * peer_error, f"{name}: {error:.2e} against {peer_error:.2e}"


def test_rows_that_a_dispatcher_brings(titan):
    """Experts compute rows in expert order as torchtitan's; rows of no expert are zero."""
    theirs, ours = (
        built.get_submodule(f"layers.1.{EXPERTS}") for built in build_pair(titan, "deepseek_v3")
    )
    counts = torch.tensor([5, 0, 9, 1, 0, 20, 3, 2])
    x = torch.randn(48, 256, generator=torch.Generator().manual_seed(2))
    tangent = torch.randn(40, 256, generator=torch.Generator().manual_seed(4))
    found = []
    for experts in (theirs, ours):
        rows = x.clone().requires_grad_()
        output = experts(rows, counts)[:40]
        wanted = {"x": rows, **dict(experts.named_parameters(prefix="."))}
        gradients = torch.autograd.grad(output, list(wanted.values()), tangent)
        named = dict(zip(wanted, gradients, strict=True))
        named["x"] = named["x"][:40]
        found.append({"output": output.detach(), **stock_names(named)})
    assert_close(found[1], found[0])
    assert torch.count_nonzero(ours(x, counts)[40:]) == 0


def test_checkpoints_are_torchtitans(titan):
    """State dicts have the stock names and values, and load both ways."""
    theirs, ours = build_pair(titan, "deepseek_v3")
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    theirs.load_state_dict(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert_close(run_step(ours), run_step(theirs))


def test_parameters_are_initialised_as_torchtitans(titan):
    """The experts' own init_states makes every parameter, with the spread of the config."""
    theirs, ours = (
        debug_config(titan, "deepseek_v3", imports).build().get_submodule(f"layers.1.{EXPERTS}")
        for imports in ((), (OVERRIDE,))
    )
    for experts in (theirs, ours):
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(0)
        experts.init_states()
    found = stock_names({f".{name}": value for name, value in ours.named_parameters()})
    assert len(found) == 3
    for name, value in theirs.named_parameters():
        spread = value.std()
        assert spread > 0, name
        assert (found[f".{name}"].std() - spread).abs() <= 0.01 * spread, name


def test_activation_checkpointing(titan, tmp_path):
    """torchtitan's selective checkpointing computes the experts again, and nothing changes."""
    _, ours = build_pair(titan, "deepseek_v3")
    expected = run_step(ours)
    titan.SelectiveAC.Config().build(dump_folder=str(tmp_path)).apply(ours)
    with MoeOps() as ops:
        actual = run_step(ours)
    assert ops.counts["fused_experts_forward"] == 2
    actual = {name.replace("._checkpoint_wrapped_module", ""): actual[name] for name in actual}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_compiled_blocks(titan):
    """torchtitan compiles each block with fullgraph=True; three steps train as without."""
    _, eager = build_pair(titan, "deepseek_v3")
    compiled = copy.deepcopy(eager)
    config = torch._dynamo.config
    with config.patch(
        capture_scalar_outputs=config.capture_scalar_outputs,
        skip_fwd_side_effects_in_bwd_under_checkpoint=(
            config.skip_fwd_side_effects_in_bwd_under_checkpoint
        ),
    ):
        torch._dynamo.reset()
        titan.compile_blocks(compiled)
        assert_close(run_step(compiled), run_step(eager))
        losses = train(compiled, 3)
    assert losses[2] < losses[0]
    for loss, expected in zip(losses, train(eager, 3), strict=True):
        assert abs(loss - expected) <= 1e-3 * expected


def train(model, num_steps):
    """Return the loss of each step of learning one batch by heart."""
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(num_steps):
        logits = model(tokens, torch.arange(32).expand(2, 32))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_rejects_other_experts(titan):
    """gpt-oss's experts have biases and a clamp of their own."""
    config = titan.models["gpt_oss"].model_registry("debugmodel").model
    with pytest.raises(ValueError, match=rf"{OVERRIDE}: expected RoutedExperts with .*GptOss"):
        titan.override(config, OVERRIDE)


def test_rejects_experts_of_an_unknown_kind(titan):
    """A converter's subclass of the stock experts computes something else."""
    config = debug_config(titan, "deepseek_v3")
    layer = config.layers[1].moe.routed_experts

    stock: Any = titan.GroupedExperts
    stock_config: Any = stock.Config

    class Quantised(stock):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(stock_config):
            pass

    layer.inner_experts = Quantised.Config(dim=256, hidden_dim=256, num_experts=8)
    with pytest.raises(ValueError, match=r"got RoutedExperts.Config with .*Quantised.Config"):
        titan.override(config, OVERRIDE)


def check_expert_parallel(rank, world_size, backend):
    """Three of six experts on each rank, and half of a batch, against the whole batch here."""
    from torchtitan.distributed.spmd_types import set_spmd_meshes
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.config_utils import make_routed_experts_config

    from moe_ops.integrations.torchtitan import fused_experts

    own = slice(3 * rank, 3 * rank + 3)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    set_spmd_backend(backend)
    if backend == "spmd_types":
        set_spmd_meshes(dense_mesh=mesh, sparse_mesh=mesh)
    config = make_routed_experts_config(
        dim=32, hidden_dim=48, num_experts=6, top_k=2, param_init={}, comm_backend="standard"
    )
    whole, layer = config.build(), fused_experts(config).build()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.2)
    layer.load_state_dict(whole.state_dict())
    # Parameters are what each backend makes of them: local tensors, or DTensors.
    for name, parameter in list(layer.inner_experts.named_parameters()):
        local = parameter.detach()[own].clone()
        if backend == "partial_dtensor":
            local = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(layer.inner_experts, name, nn.Parameter(local))
    layer.token_dispatcher.wire_meshes(ep_mesh=mesh)

    x, scores = torch.randn(2, 24, 32), torch.rand(2, 24, 2)
    tangent = torch.randn(2, 24, 32)
    affinity = torch.rand(2, 24, 6)
    affinity[..., 1], affinity[0, :, 5] = -1.0, 2.0  # One expert has nothing, one half of a batch.
    ids = affinity.topk(2).indices
    if backend == "spmd_types":  # Its collective through gloo takes splits of one size only.
        low, high = (part.topk(1).indices for part in affinity.split(3, -1))
        ids = torch.cat([low, high + 3], -1)

    def run(layer, part):
        mine, weights = (t[part].clone().requires_grad_() for t in (x, scores))
        counts = torch.bincount(ids[part].flatten(), minlength=6)
        output = layer(mine, weights, ids[part], counts)
        output.backward(tangent[part])
        return {"output": output.detach(), "x": mine.grad, "scores": weights.grad}

    with MoeOps() as ops:
        found = run(layer, slice(rank, rank + 1))
    assert ops.counts["grouped_gemm"] == 2
    assert not ops.counts["fused_experts_forward"]
    expected = run(whole, slice(0, 2))
    errors = {
        name: relative_error(value, expected[name][rank : rank + 1])
        for name, value in found.items()
    }
    w13, w2 = (
        grad.to_local() if backend == "partial_dtensor" else grad
        for grad in (layer.inner_experts.w13.grad, layer.inner_experts.w2_EDF.grad)
    )
    for name, grad in {"w1_EFD": w13[:, :, 0], "w3_EFD": w13[:, :, 1], "w2_EDF": w2}.items():
        errors[name] = relative_error(grad, getattr(whole.inner_experts, name).grad[own])
    assert max(errors.values()) <= BF16, errors


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
def test_expert_parallel(installed, backend):
    """torchtitan's dispatcher moves the tokens of two ranks, and moe ops compute those that came."""
    # Importing torchtitan changes a process: these have no other test.
    with all_ranks() as ranks:
        ranks(2).run(check_expert_parallel, backend=backend)


def test_without_torchtitan():
    """Importing the integration says what is expected."""
    code = "import sys; sys.modules['torchtitan'] = None; import moe_ops.integrations.torchtitan"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    expected = "ImportError: moe_ops.integrations.torchtitan: expected torchtitan >= 0.3, got none "
    assert last.startswith(expected)
    assert last.endswith("pip install 'torchtitan>=0.3'")


def test_every_code_block_of_the_page_runs(installed):
    run_python_blocks(DOCS / "torchtitan.md")
