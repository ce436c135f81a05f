# SPDX-License-Identifier: Apache-2.0
"""Every class in transformers' experts interface gives the numbers of its own eager forward.

The classes are found in the installed transformers, so a new release brings its own. Each is built
alone at a tiny size and is given a routing, so no tie can hide or fake a difference.
"""

import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from moe_ops.integrations.transformers import known_activation
from testing import dropped_slots
from testing.pages import DOCS, ROOT
from testing.tolerances import MODULE_NORM, relative_error

NUM_TOKENS, TOP_K, NUM_EXPERTS = 24, 3, 6
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)


def find_experts_classes():
    models = Path(transformers.__file__).parent / "models"
    return [
        (f"transformers.models.{path.parent.name}.{path.stem}", name)
        for path in sorted(models.glob("*/modeling_*.py"))
        for name in DECORATED.findall(path.read_text(encoding="utf-8"))
    ]


EXPERTS_CLASSES = find_experts_classes()
# By release of transformers, how many there are.
NUM_CLASSES = {"5.17.0": 55, "5.24.0": 68}
# One class for each way in which a class can differ from the plain gated one.
VARIANTS = [
    ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"),
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"),
    ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts"),
]
over_classes = pytest.mark.parametrize(
    ("module_name", "class_name"), EXPERTS_CLASSES, ids=[name for _, name in EXPERTS_CLASSES]
)
over_variants = pytest.mark.parametrize(
    ("module_name", "class_name"), VARIANTS, ids=[name for _, name in VARIANTS]
)


def tiny_config():
    """Return a config with every name under which a class looks up a size, activation or limit.

    A class that reads another name fails with an AttributeError that says it. The limits are low
    enough to clamp some of the values here.
    """
    return SimpleNamespace(
        num_experts=NUM_EXPERTS,
        num_local_experts=NUM_EXPERTS,
        n_routed_experts=NUM_EXPERTS,
        moe_num_experts=NUM_EXPERTS,
        hidden_size=16,
        moe_hidden_size=16,
        moe_latent_size=None,
        intermediate_size=12,
        moe_intermediate_size=12,
        hidden_act="silu",
        hidden_activation="gelu_pytorch_tanh",
        mlp_hidden_act="relu2",
        swiglu_limit=1.0,
        swiglu_alpha=1.702,
        mlp_gate_softcap=1.5,
        mlp_up_softcap=2.0,
        post_norm_eps=1e-6,
        _experts_implementation="eager",
    )


def make_experts(module_name, class_name, dtype=torch.float32, limit=1.0):
    torch.manual_seed(0)
    experts = getattr(importlib.import_module(module_name), class_name)(tiny_config())
    for name in ("limit", "swiglu_limit"):
        if hasattr(experts, name):
            setattr(experts, name, limit)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.4)
    return experts.to(dtype)


def make_inputs(dtype=torch.float32):
    """Return hidden states, ids and weights. Expert 2 has no token, and expert 4 has them all."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(NUM_TOKENS, 16, generator=generator)
    affinity = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    affinity[:, 2], affinity[:, 4] = -1.0, 2.0
    top_k_index = affinity.topk(TOP_K).indices
    top_k_weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator) + 0.1
    return hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype)


def run(experts, implementation, hidden_states, top_k_index, top_k_weights, autocast=False):
    """Return by name the output, and the gradients of all differentiable inputs for one tangent."""
    experts.config._experts_implementation = implementation
    hidden_states = hidden_states.detach().requires_grad_()
    top_k_weights = top_k_weights.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = experts(hidden_states, top_k_index, top_k_weights)
    generator = torch.Generator().manual_seed(2)
    tangent = torch.randn(output.shape, generator=generator).to(output.dtype)
    wanted = {"hidden_states": hidden_states, "top_k_weights": top_k_weights}
    wanted |= dict(experts.named_parameters())
    gradients = torch.autograd.grad(output, list(wanted.values()), tangent)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_close(actual, expected, tolerance=MODULE_NORM[torch.float32]):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == value.dtype, name
        assert value.norm() > 0, f"{name} is zero in eager: the comparison says nothing"
        error = relative_error(actual[name], value)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def test_finds_the_classes():
    """The search above finds the plain class and each variant, as many as the pages say."""
    number = NUM_CLASSES.get(transformers.__version__)
    if number is None:
        assert len(EXPERTS_CLASSES) >= 55
    else:
        assert len(EXPERTS_CLASSES) == number
    told = [f"{number} in {version}" for version, number in NUM_CLASSES.items()]
    page = (DOCS / "transformers.md").read_text(encoding="utf-8")
    assert f"in the installed transformers, {' and '.join(told)}," in page
    assert f"({told[-1]};" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(VARIANTS) <= set(EXPERTS_CLASSES)
    experts = [make_experts(*names) for names in EXPERTS_CLASSES]
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        assert {getattr(module, flag) for module in experts} == {True, False}, flag


@over_classes
def test_matches_eager(module_name, class_name):
    experts = make_experts(module_name, class_name)
    inputs = make_inputs()
    assert_close(run(experts, "moe_ops", *inputs), run(experts, "eager", *inputs))


@over_classes
def test_dropped_slots(module_name, class_name):
    """Experts of other ranks have the ids E (the sentinel), more than E, or -1.

    The reference gives these slots to expert 0 with weight 0. Ours gets a number or NaN for their
    weight, which must not matter.
    """
    experts = make_experts(module_name, class_name)
    hidden_states, top_k_index, top_k_weights = make_inputs()
    is_dropped = torch.rand(top_k_index.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    is_dropped[5] = is_dropped[11] = True
    sentinels = torch.tensor([NUM_EXPERTS, -1, NUM_EXPERTS + 7]).expand_as(top_k_index)
    dropped_index = torch.where(is_dropped, sentinels, top_k_index)
    unread = top_k_weights.clone()
    unread[::2] = unread[::2].masked_fill(is_dropped[::2], torch.nan)
    assert 0 < unread.isnan().sum() < is_dropped.sum()

    actual = run(experts, "moe_ops", hidden_states, dropped_index, unread)
    for name in ("output", "hidden_states"):
        assert torch.count_nonzero(actual[name][[5, 11]]) == 0, name
    assert torch.count_nonzero(actual["top_k_weights"][is_dropped]) == 0

    expected = run(
        experts,
        "eager",
        hidden_states,
        top_k_index.masked_fill(is_dropped, 0),
        top_k_weights.masked_fill(is_dropped, 0.0),
    )
    expected["top_k_weights"] = expected["top_k_weights"].masked_fill(is_dropped, 0.0)
    assert_close(actual, expected)


@over_classes
def test_bfloat16_is_as_accurate_as_batched_mm(module_name, class_name):
    """Both are compared with fp64 on the same bf16 values.

    batched_mm is the peer because it rounds where we do. Some eager loops compute in fp32.
    """
    # No value here comes near this limit. At a limit itself clamp's gradient is 1 up to torch 2.13 and
    # 0 from 2.14 on; ours is 1, and fp64 has either.
    experts = make_experts(module_name, class_name, torch.bfloat16, limit=3.59375)
    hidden_states, top_k_index, top_k_weights = make_inputs(torch.bfloat16)
    actual = run(experts, "moe_ops", hidden_states, top_k_index, top_k_weights)
    peer = run(experts, "batched_mm", hidden_states, top_k_index, top_k_weights)
    expected = run(
        experts.double(), "eager", hidden_states.double(), top_k_index, top_k_weights.double()
    )
    for name, value in expected.items():
        assert actual[name].dtype == torch.bfloat16, name
        error, peer_error = relative_error(actual[name], value), relative_error(peer[name], value)
        assert error <= 1.25 * peer_error, f"{name}: {error:.2e} against {peer_error:.2e}"


@over_variants
def test_expert_parallel_ranks_add_up(module_name, class_name):
    """Two ranks have half of the experts each. Outputs and input gradients add to the whole's."""
    whole = make_experts(module_name, class_name)
    hidden_states, top_k_index, top_k_weights = make_inputs()
    expected = run(whole, "moe_ops", hidden_states, top_k_index, top_k_weights)

    num_local = NUM_EXPERTS // 2
    partial = []
    for rank in range(2):
        local = make_experts(module_name, class_name)
        local.num_experts = num_local
        for name, parameter in whole.named_parameters():
            setattr(local, name, nn.Parameter(parameter[rank * num_local :][:num_local].detach()))
        is_remote = top_k_index // num_local != rank
        partial.append(
            run(
                local,
                "moe_ops",
                hidden_states,
                (top_k_index % num_local).masked_fill(is_remote, num_local),
                top_k_weights.masked_fill(is_remote, 0.0),
            )
        )
    total = {
        name: torch.cat([rank[name] for rank in partial])
        if name in dict(whole.named_parameters())
        else partial[0][name] + partial[1][name]
        for name in expected
    }
    assert_close(total, expected)


@over_variants
def test_no_slot_stays(module_name, class_name):
    """A rank that owns no expert of any token gives zeros."""
    experts = make_experts(module_name, class_name)
    hidden_states, top_k_index, top_k_weights = make_inputs()
    results = run(
        experts, "moe_ops", hidden_states, torch.full_like(top_k_index, NUM_EXPERTS), top_k_weights
    )
    for name, value in results.items():
        assert torch.count_nonzero(value) == 0, name


@over_variants
def test_no_tokens(module_name, class_name):
    experts = make_experts(module_name, class_name)
    inputs = [tensor[:0] for tensor in make_inputs()]
    results = run(experts, "moe_ops", *inputs)
    assert results["output"].shape == (0, 16)
    for name, value in results.items():
        assert torch.count_nonzero(value) == 0, name


@over_variants
def test_int32_ids(module_name, class_name):
    experts = make_experts(module_name, class_name)
    hidden_states, top_k_index, top_k_weights = make_inputs()
    actual = run(experts, "moe_ops", hidden_states, top_k_index.int(), top_k_weights)
    expected = run(experts, "moe_ops", hidden_states, top_k_index, top_k_weights)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@over_variants
def test_batched_hidden_states(module_name, class_name):
    """Inputs of (batch, sequence, hidden) give the same numbers in that shape."""
    experts = make_experts(module_name, class_name)
    inputs = make_inputs()
    batched = [tensor.reshape(4, NUM_TOKENS // 4, -1) for tensor in inputs]
    experts.config._experts_implementation = "moe_ops"
    output = experts(*batched)
    assert output.shape == (4, NUM_TOKENS // 4, 16)
    assert torch.equal(output.reshape(NUM_TOKENS, 16), experts(*inputs))


@over_variants
def test_experts_in_bfloat16_under_float32_hidden_states(module_name, class_name):
    """Experts compute in their own dtype. Output and gradients have the dtypes of their tensors."""
    # No value is clamped: one that bf16 rounds across a limit would lose its whole gradient.
    experts = make_experts(module_name, class_name, torch.bfloat16, limit=100.0)
    inputs = make_inputs()
    actual = run(experts, "moe_ops", *inputs)
    dtypes = {name: value.dtype for name, value in actual.items()}
    assert dtypes["output"] == dtypes["hidden_states"] == dtypes["top_k_weights"] == torch.float32
    assert dtypes["down_proj"] == torch.bfloat16
    for name, value in run(experts.float(), "eager", *inputs).items():
        assert relative_error(actual[name], value) <= MODULE_NORM[torch.bfloat16], name


@over_variants
def test_autocast(module_name, class_name):
    """fp32 experts under bf16 autocast multiply in bf16 and give everything in fp32."""
    experts = make_experts(module_name, class_name, limit=100.0)
    hidden_states, top_k_index, top_k_weights = make_inputs()
    actual = run(experts, "moe_ops", hidden_states, top_k_index, top_k_weights, autocast=True)
    expected = run(experts, "eager", hidden_states, top_k_index, top_k_weights)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32, name
        assert relative_error(actual[name], value) <= MODULE_NORM[torch.bfloat16], name
        if name.endswith("_proj"):
            assert relative_error(actual[name], value) > 1e-4, f"{name} was not computed in bf16"


@over_variants
def test_compiled_under_autocast(module_name, class_name):
    """Switching autocast on makes another graph, whose GEMMs are in bf16 too."""
    torch._dynamo.reset()
    experts = make_experts(module_name, class_name, limit=100.0)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    expected = run(experts, "eager", *inputs)
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        hidden_states, top_k_index, top_k_weights = inputs
        actual = run(compiled, "moe_ops", hidden_states, top_k_index, top_k_weights, autocast)
        for name, value in actual.items():
            error = relative_error(value, expected[name.removeprefix("_orig_mod.")])
            assert error <= MODULE_NORM[dtype], name
            assert autocast == (error > 1e-4) or name.endswith(("_bias", "weights")), name


def test_biases_in_another_dtype():
    """The weights are cast to bf16 and the biases left in fp32."""
    experts = make_experts(*VARIANTS[1], limit=100.0)
    inputs = make_inputs()
    expected = run(experts, "eager", *inputs)
    for name in ("gate_up_proj", "down_proj"):
        getattr(experts, name).data = getattr(experts, name).data.bfloat16()
    actual = run(experts, "moe_ops", *inputs)
    assert actual["down_proj_bias"].dtype == torch.float32
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= MODULE_NORM[torch.bfloat16], name


def test_frozen_experts_and_router():
    """Only what requires grad gets a gradient, and it is the same."""
    experts, inputs = make_experts(*VARIANTS[1]), make_inputs()
    expected = run(experts, "moe_ops", *inputs)["hidden_states"]
    experts.requires_grad_(False)
    hidden_states = inputs[0].requires_grad_()
    output = experts(hidden_states, *inputs[1:])
    tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(tangent)
    assert torch.equal(hidden_states.grad, expected)
    assert all(parameter.grad is None for parameter in experts.parameters())


def with_another_activation(experts):
    """Give experts an activation that moe::fused_experts does not have."""
    if hasattr(experts, "alpha"):
        experts.alpha = 1.3
    else:
        experts.act_fn = nn.Tanh()
    assert known_activation(experts) is None
    return experts


@over_variants
def test_another_activation_matches_eager(module_name, class_name):
    experts = with_another_activation(make_experts(module_name, class_name))
    inputs = make_inputs()
    assert_close(run(experts, "moe_ops", *inputs), run(experts, "eager", *inputs))


@over_variants
def test_another_activation_reads_no_dropped_slot(module_name, class_name):
    experts = with_another_activation(make_experts(module_name, class_name))
    experts.config._experts_implementation = "moe_ops"
    dropped_slots.assert_not_read(experts, make_inputs()[0], NUM_EXPERTS, experts.parameters())


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_post_expert_norm(eps):
    """In transformers 5.23 each expert's output may be normed before it is weighted."""
    experts = make_experts(*VARIANTS[0])
    hidden_states, top_k_index, top_k_weights = make_inputs()
    top_k_index[5, 0] = top_k_index[11] = NUM_EXPERTS
    top_k_weights[5, 0] = top_k_weights[11, :2] = torch.nan
    experts.has_post_expert_norm = True
    experts.post_expert_norm = functools.partial(dropped_slots.offset_norm, eps=eps)
    actual = run(experts, "moe_ops", hidden_states, top_k_index, top_k_weights)
    assert torch.count_nonzero(actual["output"][11]) == 0
    assert torch.count_nonzero(actual["hidden_states"][11]) == 0
    assert actual["top_k_weights"][5, 0] == 0
    assert torch.count_nonzero(actual["top_k_weights"][11]) == 0

    hidden_states.requires_grad_()
    output = torch.zeros_like(hidden_states)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(top_k_index == expert)
        gate, up = (hidden_states[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        rows = experts.post_expert_norm(experts.act_fn(gate) * up @ experts.down_proj[expert].T)
        output = output.index_add(0, token, rows * top_k_weights[token, slot, None])
    tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(output, hidden_states, tangent)
    tolerance = MODULE_NORM[torch.float32]
    assert relative_error(actual["output"], output) <= tolerance
    assert relative_error(actual["hidden_states"], gradient) <= tolerance
