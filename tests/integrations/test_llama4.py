# SPDX-License-Identifier: Apache-2.0
"""replace_llama4_moe_() gives the numbers of transformers' Llama 4 from the chosen experts alone."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from moe_ops.compat.reference.layers.llama4_moe import Llama4GroupedGemmTextMoe
from moe_ops.integrations.llama4 import llama4_moe_forward, replace_llama4_moe_
from testing.tiny_models import make_model, run_step
from testing.tolerances import MODULE_NORM, relative_error

LAYERS = ["model.layers.1.feed_forward", "model.layers.3.feed_forward"]


def make_llama4(top_k=1, dtype=torch.float32):
    """Return a model of four layers whose second and fourth have experts."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=48, hidden_size=32, intermediate_size=24, intermediate_size_mlp=40,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=top_k, interleave_moe_layer_step=2,
        pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Llama4ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


@pytest.fixture
def input_ids():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def assert_same_step(actual, expected, dtype=torch.float32):
    (output, gradients), (expected_output, expected_gradients) = actual, expected
    assert relative_error(output, expected_output) <= MODULE_NORM[dtype]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0, name
        error = relative_error(gradients[name], gradient)
        assert error <= MODULE_NORM[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_transformers(top_k, input_ids):
    model = make_llama4(top_k)
    names = list(model.state_dict())
    expected = run_step(model, input_ids)
    assert replace_llama4_moe_(model) == LAYERS
    assert list(model.state_dict()) == names
    assert_same_step(run_step(model, input_ids), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_in_other_dtypes(dtype, autocast):
    """Both round to bf16, in other places, so both are held against fp32 of the same numbers."""
    layer = make_llama4(2, dtype).get_submodule(LAYERS[0])
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, exact_logits = copy.deepcopy(layer).float()(x.float())
    replace_llama4_moe_(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, logits = layer(x)
    loose = autocast or dtype == torch.bfloat16
    tolerance = MODULE_NORM[torch.bfloat16 if loose else torch.float32]
    assert output.shape == (14, 32)
    assert logits.shape == (14, 4)
    assert relative_error(output, exact) <= tolerance
    assert relative_error(logits, exact_logits) <= tolerance


def test_computes_the_chosen_experts_alone(input_ids):
    """NaN in an expert that no token chose reaches the output of transformers' loop, not ours."""
    layer = make_llama4(1).get_submodule(LAYERS[0])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected, logits = layer(x)
    unused = (set(range(4)) - set(logits.argmax(1).tolist())).pop()
    with torch.no_grad():
        layer.experts.down_proj[unused] = float("nan")
    assert layer(x)[0].isnan().all()
    replace_llama4_moe_(layer)
    assert relative_error(layer(x)[0], expected) <= MODULE_NORM[torch.float32]


def test_compiled_and_checkpointed(input_ids):
    model = make_llama4()
    expected = run_step(model, input_ids)
    replace_llama4_moe_(model)
    layer = model.get_submodule(LAYERS[0])
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, ours in zip(compiled(x), layer(x), strict=True):
        assert relative_error(actual, ours) <= MODULE_NORM[torch.float32]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(run_step(model, input_ids), expected)


def test_routers_run_once_and_give_their_logits(input_ids):
    """A hook on a router sees the same logits, and the layer returns them."""
    model = make_llama4()
    routed, returned = [], []
    for name in LAYERS:
        layer = model.get_submodule(name)
        layer.router.register_forward_hook(lambda _module, _args, output: routed.append(output[1]))
        layer.register_forward_hook(lambda _module, _args, output: returned.append(output[1]))
    model(input_ids=input_ids, use_cache=False)
    replace_llama4_moe_(model)
    model(input_ids=input_ids, use_cache=False)
    for logits in (routed, returned):
        first, second, *again = logits
        assert not torch.equal(first, second)
        for actual, expected in zip(again, (first, second), strict=True):
            assert relative_error(actual, expected) <= MODULE_NORM[torch.float32]


def test_generate(input_ids):
    model = make_llama4().eval()
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(input_ids)
    expected = model.generate(input_ids, attention_mask=mask, **arguments)
    replace_llama4_moe_(model)
    assert torch.equal(model.generate(input_ids, attention_mask=mask, **arguments), expected)


def test_saved_and_loaded(input_ids, tmp_path):
    """The change is not saved. A second call, after loading, makes it again."""
    model = make_llama4()
    replace_llama4_moe_(model)
    expected = model(input_ids=input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.Llama4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert "forward" not in vars(loaded.get_submodule(LAYERS[0]))
    assert replace_llama4_moe_(loaded) == replace_llama4_moe_(loaded) == LAYERS
    assert torch.equal(loaded(input_ids=input_ids).logits, expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_compute_with_their_own_weights(copied):
    layer = make_llama4().get_submodule(LAYERS[0])
    replace_llama4_moe_(layer)
    other = copied(layer)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other(x)[0], layer(x)[0])
    with torch.no_grad():
        other.experts.down_proj.zero_()
    assert torch.equal(other(x)[0], other.shared_expert(x))
    assert not torch.equal(other(x)[0], layer(x)[0])


def test_rejects_models_without_such_layers():
    """A block of moe_ops.compat computes in its own way already."""
    config = make_llama4().config
    for model in (make_model("qwen3_moe"), nn.Linear(2, 2), Llama4GroupedGemmTextMoe(config)):
        with pytest.raises(ValueError, match=f"got {type(model).__name__} without; other models"):
            replace_llama4_moe_(model)


def hooked(layer):
    layer.experts.register_forward_pre_hook(lambda *_: None)


def another_forward(layer):
    layer.forward = lambda x: (x, x)


def another_activation(layer):
    layer.experts.act_fn = nn.Mish()


class Packed(nn.Parameter):
    """Stands for the parameters that quantisers make."""


def packed(layer):
    layer.experts.down_proj = Packed(layer.experts.down_proj.data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "has hooks on its experts"),
        (another_forward, "has a forward of its own"),
        (another_activation, "has an activation that is unknown here, Mish"),
        (packed, "has down_proj as Packed of torch.float32"),
    ],
)
def test_rejects_what_it_cannot_compute(change, reason):
    """The first layer could be replaced, the last cannot: none is."""
    model = make_llama4()
    change(model.get_submodule(LAYERS[1]))
    with pytest.raises(
        ValueError, match=rf"replace_llama4_moe_: expected .*: {LAYERS[1]} {reason}"
    ):
        replace_llama4_moe_(model)
    for name in LAYERS:
        forward = vars(model.get_submodule(name)).get("forward")
        assert getattr(forward, "func", None) is not llama4_moe_forward
