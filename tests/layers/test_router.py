# SPDX-License-Identifier: Apache-2.0
"""Router equals plain loops in all variants, and chooses as transformers' routers do."""

import itertools
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import moe_ops
from moe_ops.layers import Experts, GatedMLP, MoE, Router
from testing import checks, oracle

HIDDEN_SIZE, NUM_EXPERTS, NUM_TOKENS = 16, 12, 40

# One variant for each option of moe::topk_routing, and the combinations that models have.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised": {"renormalize": True},
    "bias": {"bias": True},
    "selected_then_softmax": {"bias": True, "score_before_topk": False},
    "sigmoid": {"score_function": "sigmoid"},
    "selected_then_sigmoid": {"score_function": "sigmoid", "score_before_topk": False},
    "scaled": {"scaling_factor": 2.5},
    "selection_bias": {"score_function": "sigmoid", "selection_bias": True, "renormalize": True},
    "groups_by_two": {"num_groups": 4, "top_groups": 2},
    "groups_by_one": {"num_groups": 3, "top_groups": 1, "group_score": "max"},
    "deepseek_v3": {
        "score_function": "sigmoid",
        "renormalize": True,
        "num_groups": 4,
        "top_groups": 2,
        "scaling_factor": 2.5,
        "selection_bias": True,
        "logits_dtype": torch.float32,
    },
}
# Arguments of Router that moe::topk_routing does not have.
OF_ROUTER = ("bias", "selection_bias", "logits_dtype")
over_variants = pytest.mark.parametrize("name", list(VARIANTS))


def make_router(name, dtype=torch.float64):
    router = Router(HIDDEN_SIZE, NUM_EXPERTS, 3, **VARIANTS[name], dtype=dtype)
    if router.e_score_correction_bias is not None:
        # The bias is as large as the scores' differences.
        router.e_score_correction_bias.normal_(std=0.1)
    return router


def make_tokens(dtype=torch.float64):
    return torch.randn(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, requires_grad=True)


def expected_routing(router, name, hidden_states):
    """Return logits by one sum for each token and expert, and the oracle's routing of them."""
    options = {key: value for key, value in VARIANTS[name].items() if key not in OF_ROUTER}
    dtype = router.logits_dtype or hidden_states.dtype
    tokens, weight = hidden_states.to(dtype), router.weight.to(dtype)
    rows = [torch.stack([(token * row).sum() for row in weight]) for token in tokens]
    logits = torch.stack(rows)
    if router.bias is not None:
        logits = logits + router.bias
    bias = router.e_score_correction_bias
    return logits, *oracle.topk_routing(logits, router.top_k, bias, **options)


@over_variants
def test_matches_reference(name):
    """Values, choices, and gradients of input and parameters through both outputs are equal."""
    router, hidden_states = make_router(name), make_tokens()
    *expected, expected_ids = expected_routing(router, name, hidden_states)
    *outputs, topk_ids = router(hidden_states)
    assert torch.equal(topk_ids.long(), expected_ids.long())
    assert topk_ids.dtype == torch.int32
    wanted = [hidden_states, *router.parameters()]
    tangents = [torch.randn_like(output) for output in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, wanted, tangents)]
    tangents = [tangent.to(each.dtype) for tangent, each in zip(tangents, expected, strict=True)]
    expected += torch.autograd.grad(expected, wanted, tangents)
    for actual, want in zip(found, expected, strict=True):
        checks.assert_close(actual, want, dtype=router.logits_dtype)


@pytest.mark.parametrize("name", ["selection_bias", "deepseek_v3"])
def test_selection_bias_selects_alone(name):
    """Another bias chooses other experts. Equal choices have equal weights."""
    router, hidden_states = make_router(name), make_tokens()
    _, weights, ids = router(hidden_states)
    assert "e_score_correction_bias" in dict(router.named_buffers())
    assert "e_score_correction_bias" not in dict(router.named_parameters())
    router.e_score_correction_bias.zero_()
    _, unbiased_weights, unbiased_ids = router(hidden_states)
    in_order, unbiased_in_order = ids.sort(1), unbiased_ids.sort(1)
    is_same = (in_order.values == unbiased_in_order.values).all(1)
    assert 0 < is_same.sum() < NUM_TOKENS
    torch.testing.assert_close(
        weights.gather(1, in_order.indices)[is_same],
        unbiased_weights.gather(1, unbiased_in_order.indices)[is_same],
    )


def test_a_selection_bias_that_is_a_parameter():
    """DeepSeek-V3's own code has one. The router trains, and the bias gets nothing."""
    router, hidden_states = make_router("deepseek_v3"), make_tokens()
    bias = torch.nn.Parameter(router.e_score_correction_bias.clone())
    _, expected, _ = router(hidden_states)
    del router.e_score_correction_bias
    router.e_score_correction_bias = bias
    _, weights, _ = router(hidden_states)
    assert torch.equal(weights, expected)
    weights.square().sum().backward()
    assert router.weight.grad.norm() > 0
    assert bias.grad is None


def test_bf16_keeps_weights_in_fp32():
    router = make_router("deepseek_v3", torch.bfloat16)
    assert router.e_score_correction_bias.dtype == torch.float32
    hidden_states = make_tokens(torch.bfloat16)
    logits, topk_weights, _ = router(hidden_states)
    assert (logits.dtype, topk_weights.dtype) == (torch.float32, torch.float32)
    exact = F.linear(hidden_states.double(), router.weight.double())
    checks.assert_close(logits, exact)
    plain_logits, plain_weights, _ = make_router("softmax", torch.bfloat16)(hidden_states)
    assert (plain_logits.dtype, plain_weights.dtype) == (torch.bfloat16, torch.float32)


@over_variants
def test_initialisation(name):
    """Weight and bias begin as in nn.Linear, and the selection bias at zero."""
    torch.manual_seed(0)
    router = Router(64, 128, 3, **{**VARIANTS[name], "num_groups": 1, "top_groups": 1})
    bound = 64**-0.5
    for parameter in router.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert parameter.mean().abs() < 0.2 * bound
    for buffer in router.buffers():
        assert not buffer.any()


def test_wrong_options_are_the_ops_errors():
    with pytest.raises(ValueError, match=r"moe::topk_routing: expected score_function"):
        Router(HIDDEN_SIZE, 4, 2, score_function="tanh")(torch.randn(2, HIDDEN_SIZE))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"hidden_size": -1}, "hidden_size >= 0, got -1"),
        ({"num_experts": 0}, "num_experts >= 1, got 0"),
        ({"top_k": -1}, "top_k >= 1, got -1"),
        ({"num_groups": 0}, "num_groups >= 1, got 0"),
        ({"num_groups": 3}, "num_experts to be a multiple of num_groups (3), got 4"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups <= num_groups (2), got 3"),
        # The user gave no groups and reads nothing about groups.
        ({"top_k": 9}, "top_k <= num_experts (4), got 9"),
        (
            {"top_k": 3, "num_groups": 2},
            "top_k <= num_experts // num_groups * top_groups (2), got 3",
        ),
    ],
)
def test_impossible_sizes_are_refused_when_it_is_made(sizes, text):
    text = f"^{re.escape(f'moe_ops.layers.Router: expected {text}')}$"
    with pytest.raises(ValueError, match=text):
        Router(**{"hidden_size": 8, "num_experts": 4, "top_k": 2, **sizes})


def is_refused(call):
    try:
        call()
    except ValueError:
        return True
    return False


def test_it_takes_the_sizes_that_the_op_takes():
    num_taken = 0
    for num_experts, top_k in itertools.product(range(7), range(-1, 8)):
        logits = torch.zeros(1, num_experts)
        for num_groups, top_groups in itertools.product(range(-1, 5), repeat=2):
            groups: dict[str, Any] = {"num_groups": num_groups, "top_groups": top_groups}
            refused = is_refused(partial(Router, 3, num_experts, top_k, **groups))
            by_op = is_refused(partial(moe_ops.topk_routing, logits, top_k, **groups))
            assert refused == by_op, (num_experts, top_k, groups)
            num_taken += not refused
    assert num_taken > 50


@pytest.mark.parametrize("name", ["softmax", "deepseek_v3"])
def test_hidden_states_of_another_size(name):
    """The linear map would say which matrices do not fit, and not whose they are."""
    router = make_router(name)
    text = r"Router: expected hidden_states\.shape\[-1\] == hidden_size \(16\), got 15$"
    for layer in (router, MoE(router, Experts(NUM_EXPERTS, HIDDEN_SIZE, 8))):
        with pytest.raises(ValueError, match=text):
            layer(make_tokens()[:, 1:])


def test_hidden_states_without_dimensions():
    with pytest.raises(ValueError, match=r"size \(16\), got a tensor without dimensions"):
        make_router("softmax")(torch.tensor(1.0, dtype=torch.float64))


def test_on_the_meta_device():
    """It has no autocast to ask."""
    router = make_router("softmax").float().to("meta")
    tokens = make_tokens().to("meta")
    with pytest.raises(TypeError, match=r"weight\.dtype \(float32\), got float64"):
        router(tokens)
    assert router(tokens.float())[0].shape == (len(tokens), NUM_EXPERTS)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.int64])
def test_hidden_states_of_another_dtype(given):
    """The linear map would not say whose matrices these are."""
    router = make_router("softmax").float()
    text = r"Router: expected hidden_states\.dtype == weight\.dtype \(float32\), got (bfloat16|int64); cast"
    for layer in (router, MoE(router, Experts(NUM_EXPERTS, HIDDEN_SIZE, 8))):
        with pytest.raises(TypeError, match=text):
            layer(make_tokens().to(given))


def test_hidden_states_of_another_dtype_under_autocast_or_with_a_dtype_for_logits():
    tokens = make_tokens().bfloat16()
    router = make_router("softmax").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = router(tokens)
        got = torch.compile(router, fullgraph=True, backend="eager")(tokens)
    for each, other in zip(got, want, strict=True):
        assert torch.equal(each, other)
    router.logits_dtype = torch.float32
    logits, _, _ = router(tokens)
    assert torch.equal(logits, tokens.float() @ router.weight.T)


@pytest.mark.parametrize("name", ["hidden_size", "num_experts", "top_k"])
def test_a_size_that_is_no_int(name):
    sizes: dict[str, Any] = {"hidden_size": 8, "num_experts": 4, "top_k": 2, name: 2.0}
    text = rf"^moe_ops\.layers\.Router: expected {name} to be an int, got 2\.0$"
    with pytest.raises(TypeError, match=text):
        Router(**sizes)


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: Router(8, 4, 2, dtype=dtype),
        lambda dtype: Experts(4, 8, 8, dtype=dtype),
        lambda dtype: GatedMLP(8, 8, dtype=dtype),
    ],
    ids=["Router", "Experts", "GatedMLP"],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64])
def test_a_dtype_that_weights_cannot_have(make, dtype):
    with pytest.raises(
        TypeError, match=r"expected dtype in \(bfloat16, float16, float32, float64\), got"
    ):
        make(dtype)


def test_no_tokens_and_no_hidden_size():
    assert Router(3, 4, 2)(torch.zeros(0, 3))[2].shape == (0, 2)
    assert Router(0, 4, 2)(torch.zeros(5, 0))[2].shape == (5, 2)


def transformers_models():
    try:
        from testing.layer_models import MODELS
    except ModuleNotFoundError:
        return []
    return list(MODELS)


@pytest.mark.parametrize("name", transformers_models())
def test_chooses_as_transformers_does(name):
    """It chooses the same experts with the same weights, for many tokens."""
    from testing import layer_models

    block = layer_models.make_block(name)
    router = MoE.from_config(layer_models.make_config(name)).load_from(block).router
    tokens = layer_models.make_hidden_states(shape=(500,))
    expected = layer_models.routing_of(block, tokens)
    logits, topk_weights, topk_ids = router(tokens)
    actual = layer_models.spread(topk_weights, topk_ids, logits.shape[1])
    assert torch.equal(actual != 0, expected != 0)
    checks.assert_close(actual, expected)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.zero_()
        assert not torch.equal(router(tokens)[2], topk_ids), "the bias was not felt"
    if router.top_groups < router.num_groups:
        router.num_groups = router.top_groups = 1
        assert not torch.equal(router(tokens)[2], topk_ids), "the groups were not felt"
