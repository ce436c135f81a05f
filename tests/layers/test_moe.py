# SPDX-License-Identifier: Apache-2.0
"""MoE equals transformers' own blocks, and survives what a module has to survive."""

import collections
import copy
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", reason="the transformers extra is not installed")

from moe_ops.layers import Experts, GatedMLP, MoE, Router
from moe_ops.layers.configs import BLOCKS, CLASSES
from testing.layer_models import (
    HIDDEN_SIZE,
    MODELS,
    NUM_EXPERTS,
    make_block,
    make_config,
    make_hidden_states,
    run_block,
    run_layer,
    tangent_of,
)
from testing.tolerances import MODULE_NORM, relative_error

# One has a shared expert with a gate, the other biases, a clamp and transposed weights.
VARIED = ["qwen2_moe", "gpt_oss"]
over_models = pytest.mark.parametrize("name", list(MODELS))
over_varied = pytest.mark.parametrize("name", VARIED)
# In transformers all models but gpt-oss score in fp32, whatever their dtype is.
TOLERANCE = {torch.float32: MODULE_NORM[torch.float32], torch.float64: 5e-7}
EXACT_FP64 = 1e-14


def make_layer(name: str, dtype: torch.dtype = torch.float32) -> MoE:
    return MoE.from_config(make_config(name)).to(dtype).load_from(make_block(name, dtype))


def in_our_terms(gradients, name: str):
    """Return gradients of transformers' block under our names and in our layout."""
    found = {}
    for their_name, gradient in gradients.items():
        our_name = re.sub(r"^gate\.", "router.", their_name)
        our_name = re.sub(r"^shared_experts\.", "shared_expert.", our_name)
        is_transposed = name.startswith(("gpt_oss", "llama4")) and gradient.ndim == 3
        # The input is the other tensor of three dimensions.
        is_transposed = is_transposed and our_name != "hidden_states"
        found[our_name] = gradient.transpose(1, 2) if is_transposed else gradient
    return found


def assert_same_step(actual: SimpleNamespace, expected: SimpleNamespace, tolerance: float) -> None:
    pairs = {
        "output": (actual.output, expected.output),
        "logits": (actual.logits, expected.logits),
    }
    assert actual.gradients.keys() == expected.gradients.keys()
    pairs |= {key: (actual.gradients[key], want) for key, want in expected.gradients.items()}
    for key, (got, want) in pairs.items():
        assert got.shape == want.shape, key
        assert got.dtype == want.dtype, key
        assert want.norm() > 0, f"{key} is zero: the comparison says nothing"
        error = relative_error(got, want)
        assert error <= tolerance, f"{key}: relative error {error:.2e} above {tolerance:.0e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@over_models
def test_equals_transformers(name, dtype):
    """Output, logits, and the gradients of the input and every parameter are equal."""
    block, layer = make_block(name, dtype), make_layer(name, dtype)
    hidden_states = make_hidden_states(dtype)
    expected = run_block(block, hidden_states)
    expected.gradients = in_our_terms(expected.gradients, name)
    is_exact = name == "gpt_oss" and dtype == torch.float64
    tolerance = EXACT_FP64 if is_exact else TOLERANCE[dtype]
    assert_same_step(run_layer(layer, hidden_states), expected, tolerance)


@over_models
def test_load_from_copies(name):
    """The layer gets weights of its own, in its own dtype."""
    block = make_block(name)
    layer = MoE.from_config(make_config(name), dtype=torch.bfloat16)
    assert layer.load_from(block) is layer
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    storages = {tensor.data_ptr() for tensor in block.state_dict().values()}
    assert storages.isdisjoint(tensor.data_ptr() for tensor in layer.state_dict().values())
    their_sum = sum(tensor.double().square().sum() for tensor in block.state_dict().values())
    our_sum = sum(tensor.double().square().sum() for tensor in layer.state_dict().values())
    torch.testing.assert_close(our_sum, their_sum, rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(22,), (2, 11), (2, 1, 11)])
def test_leading_dimensions(shape):
    layer = make_layer("qwen2_moe")
    expected_output, expected_logits = layer(make_hidden_states(shape=(22,)))
    output, logits = layer(make_hidden_states(shape=(22,)).reshape(*shape, HIDDEN_SIZE))
    assert torch.equal(output, expected_output.reshape(*shape, HIDDEN_SIZE))
    assert torch.equal(logits, expected_logits)


@over_varied
def test_without_tokens(name):
    layer = make_layer(name)
    step = run_layer(layer, make_hidden_states(shape=(2, 0)))
    assert step.output.shape == (2, 0, HIDDEN_SIZE)
    assert step.logits.shape == (0, NUM_EXPERTS)
    for key, gradient in step.gradients.items():
        assert not gradient.any(), key


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("deepseek_v3", "aot_eager"),
        ("llama4_text", "aot_eager"),
        ("qwen2_moe", "aot_eager"),
        pytest.param("olmoe", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles(name, backend):
    layer, hidden_states = make_layer(name), make_hidden_states()
    expected = run_layer(layer, hidden_states)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert_same_step(
        run_layer(layer, hidden_states, compiled), expected, MODULE_NORM[torch.float32]
    )


def test_token_counts_share_a_graph():
    """Five lengths take two compilations, one for the first length and one for any other."""
    layer = make_layer("qwen2_moe")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (11, 7, 2, 16, 5):
        hidden_states = make_hidden_states(shape=(2, length))
        expected = run_layer(layer, hidden_states)
        assert_same_step(
            run_layer(layer, hidden_states, compiled), expected, MODULE_NORM[torch.float32]
        )
    assert counter.frame_count <= 2


@over_varied
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(name, use_reentrant):
    layer, hidden_states = make_layer(name), make_hidden_states()
    expected = run_layer(layer, hidden_states)

    def call(hidden_states):
        return checkpoint(layer, hidden_states, use_reentrant=use_reentrant)

    # Reentrant checkpointing works only with backward().
    output, logits = call(hidden_states)
    torch.autograd.backward([output, logits], [tangent_of(output, 2), tangent_of(logits, 3)])
    named = {"hidden_states": hidden_states, **dict(layer.named_parameters())}
    gradients = {key: tensor.grad for key, tensor in named.items()}
    found = SimpleNamespace(output=output, logits=logits, gradients=gradients)
    assert_same_step(found, expected, tolerance=0.0)


@over_varied
def test_autocast(name):
    """The products are computed in bf16, and the parameters' gradients are fp32."""
    layer = make_layer(name)

    def call(hidden_states):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(hidden_states)

    tokens = make_hidden_states(shape=(40,)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.router(tokens)[2].sort(1).values
    # Where the scores of two experts differ by a rounding, either choice is right.
    is_decided = (rounded == layer.router(tokens)[2].sort(1).values).all(1)
    assert is_decided.sum() > 30
    hidden_states = tokens[is_decided].requires_grad_()

    expected, found = run_layer(layer, hidden_states), run_layer(layer, hidden_states, call)
    assert found.output.dtype == torch.bfloat16
    assert relative_error(found.output, expected.output) < 1e-2
    for key, gradient in found.gradients.items():
        assert gradient.dtype == torch.float32, key
        assert relative_error(gradient, expected.gradients[key]) < 2e-2, key


@over_models
def test_meta_then_to_empty(name):
    config = make_config(name)
    with torch.device("meta"):
        layer = MoE.from_config(config)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan)
    for module in layer.modules():
        reset_parameters = getattr(module, "reset_parameters", None)
        if reset_parameters is not None:
            reset_parameters()
    for key, tensor in layer.state_dict().items():
        assert tensor.isfinite().all(), key
    hidden_states = make_hidden_states()
    expected = run_layer(make_layer(name), hidden_states)
    assert_same_step(
        run_layer(layer.load_from(make_block(name)), hidden_states), expected, tolerance=0.0
    )


@over_varied
def test_state_dict_round_trip(name):
    layer, hidden_states = make_layer(name), make_hidden_states()
    other = MoE.from_config(make_config(name))
    assert not torch.equal(other(hidden_states)[0], layer(hidden_states)[0])
    other.load_state_dict(layer.state_dict())
    expected = layer(hidden_states)[0]
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(hidden_states)[0], expected)
        same.load_from(make_block(name))


def test_of_parts():
    """A layer made by hand, without a config, is the sum of what its parts compute."""
    router = Router(16, 4, 2, bias=True)
    experts = Experts(4, 16, 8, activation="relu_squared", gated=False)
    shared_expert, shared_expert_gate = GatedMLP(16, 8, "gelu"), nn.Linear(16, 1)
    hidden_states = torch.randn(5, 16)
    logits, weights, ids = router(hidden_states)
    expected = experts(hidden_states, ids, weights)
    shared = shared_expert(hidden_states)
    parts = (router, experts, shared_expert, shared_expert_gate)
    for layer, output in (
        (MoE(router, experts), expected),
        (MoE(router, experts, shared_expert), expected + shared),
        (MoE(*parts), expected + torch.sigmoid(shared_expert_gate(hidden_states)) * shared),
    ):
        assert torch.equal(layer(hidden_states)[0], output)
        assert torch.equal(layer(hidden_states)[1], logits)


def test_rejects_a_gate_without_a_shared_expert():
    with pytest.raises(
        ValueError,
        match=r"MoE: expected shared_expert with shared_expert_gate, got None; pass both",
    ):
        MoE(Router(16, 4, 2), Experts(4, 16, 8), shared_expert_gate=nn.Linear(16, 1))


def test_rejects_an_unknown_model():
    known = "qwen3_moe, qwen2_moe, mixtral, olmoe, deepseek_v3, glm4_moe, gpt_oss, llama4_text"
    with pytest.raises(ValueError, match=rf"model_type to be one of {known}, got 'bert'$"):
        MoE.from_config(SimpleNamespace(model_type="bert"))
    with pytest.raises(ValueError, match=r"got None$"):
        MoE.from_config({"model_type": "mixtral"})


@pytest.mark.parametrize(
    ("name", "changes", "dense", "sparse"),
    [
        ("qwen3_moe", {"mlp_only_layers": [2]}, [2], [0, 1, 3]),
        ("qwen2_moe", {"decoder_sparse_step": 2}, [0, 2], [1, 3]),
        ("deepseek_v3", {}, [0], [1, 2]),
        ("llama4_text", {"moe_layers": [1, 3]}, [0, 2], [1, 3]),
        ("mixtral", {}, [], [0, 1]),
    ],
)
def test_rejects_a_layer_without_experts(name, changes, dense, sparse):
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    for layer_idx in sparse:
        MoE.from_config(config, layer_idx)
    for layer_idx in dense:
        with pytest.raises(
            ValueError, match=rf"experts in this {name} config, got {layer_idx}; pass N"
        ):
            MoE.from_config(config, layer_idx)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [("mixtral", "router_jitter_noise", 0.1), ("qwen3_moe", "hidden_act", "tanh")],
)
def test_rejects_a_setting_it_has_not_got(name, attribute, value):
    config = make_config(name)
    setattr(config, attribute, value)
    with pytest.raises(ValueError, match=rf"from_config: expected config.{attribute} .*{value}"):
        MoE.from_config(config)


def test_load_from_rejects_another_block():
    layer = MoE.from_config(make_config("qwen3_moe"))
    before = copy.deepcopy(layer.state_dict())
    missing = r"expected shared_expert.* to be no such tensor, got \(.*\) in Sequential"
    with pytest.raises(ValueError, match=missing):
        layer.load_from(as_a_class_of_ones_own(make_block("qwen2_moe")))
    for other in ("qwen2_moe", "mixtral", "olmoe"):
        name = type(make_block(other)).__name__
        expected = rf"expected Qwen3MoeSparseMoeBlock, got {name}; .* a qwen3_moe config$"
        with pytest.raises(ValueError, match=expected):
            layer.load_from(make_block(other))
    shape = r"expected experts.down_proj to be \(8, 32, 24\), got \(8, 32, 12\) in "
    config = make_config("qwen3_moe")
    config.moe_intermediate_size = 12
    with pytest.raises(ValueError, match=shape):
        layer.load_from(type(make_block("qwen3_moe"))(config))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def as_a_class_of_ones_own(block):
    return nn.Sequential(collections.OrderedDict(block.named_children()))


def test_load_from_takes_a_class_of_ones_own():
    """A class is taken by its names and shapes, and a subclass of the model's own block too."""
    hidden_states = make_hidden_states()
    expected = make_layer("qwen3_moe")(hidden_states)[0]
    block = make_block("qwen3_moe")
    subclass = make_block("qwen3_moe")
    subclass.__class__ = type("Mine", (type(subclass),), {})
    for taken in (as_a_class_of_ones_own(block), subclass):
        layer = MoE.from_config(make_config("qwen3_moe")).load_from(taken)
        assert torch.equal(layer(hidden_states)[0], expected)


def test_every_model_has_its_class():
    for name, (_, block_class, _) in MODELS.items():
        assert CLASSES[make_config(name).model_type] == block_class
    assert CLASSES.keys() == BLOCKS.keys()


def test_from_config_of_a_subclass():
    class Named(MoE):
        def __init__(self, *parts, name="layer"):
            super().__init__(*parts)
            self.name = name

    class Other(MoE):
        def __init__(self, config):
            pass

    layer: Any = Named.from_config(make_config("qwen3_moe")).load_from(make_block("qwen3_moe"))
    assert (type(layer), layer.name) == (Named, "layer")
    with pytest.raises(
        TypeError, match=r"from_config: expected the constructor of Other to take ro"
    ):
        Other.from_config(make_config("qwen3_moe"))


def test_load_from_rejects_a_layer_of_parts():
    with pytest.raises(ValueError, match=r"load_from: expected a layer made by MoE.from_config"):
        MoE(Router(16, 4, 2), Experts(4, 16, 8)).load_from(make_block("qwen3_moe"))


@pytest.mark.parametrize(("num_experts", "hidden_size"), [(4, 8), (8, 4)])
def test_rejects_a_router_of_other_experts(num_experts, hidden_size):
    experts = Experts(4, 4, 6)
    expected = rf"\(4, 4\), got \({num_experts}, {hidden_size}\)"
    with pytest.raises(ValueError, match=expected):
        MoE(Router(hidden_size, num_experts, 2), experts)


@pytest.mark.parametrize("layer_idx", [-1, 10**6])
def test_rejects_a_layer_that_the_model_has_not(layer_idx):
    with pytest.raises(ValueError, match=f"layer_idx of a layer with experts.*got {layer_idx}"):
        MoE.from_config(make_config("qwen3_moe"), layer_idx)
