# SPDX-License-Identifier: Apache-2.0
"""calculate_topk routes as the routers of transformers, and topk_routing where it cannot.

T tokens, E experts, K top_k, H hidden_size.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

import moe_ops
from moe_ops.compat import calculate_topk
from testing import checks

pytest.importorskip("transformers", reason="compares with transformers")

NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 12, 3, 16


def router_of(model: str, name: str, **more):
    """Return a router with random weights. It reads only these sizes and flags of its config."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = SimpleNamespace(
        hidden_size=HIDDEN_SIZE,
        num_experts=NUM_EXPERTS,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        **more,
    )
    router = getattr(module, name)(config)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor)
    return router


def compare(hidden, router, found, expected):
    """Compare two pairs of (weights, ids): experts, weights and gradients are equal.

    transformers gives a token's experts in any order.
    """
    # Each expert has its tangent, so the order does not matter.
    tangents = torch.randn(len(hidden), NUM_EXPERTS)
    inputs = [hidden, *router.parameters()]
    results = []
    for weights, ids in (found, expected):
        order = ids.sort(dim=1)
        gradients = torch.autograd.grad(weights, inputs, tangents.gather(1, ids), retain_graph=True)
        results.append((order.values, weights.gather(1, order.indices), *gradients))
    (ids, *values), (expected_ids, *expected_values) = results
    assert torch.equal(ids, expected_ids)
    for value, wanted in zip(values, expected_values, strict=True):
        assert wanted.norm() > 0
        checks.assert_close(value, wanted)


def hidden_states():
    return torch.randn(40, HIDDEN_SIZE, requires_grad=True)


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe(renormalize):
    """It takes the softmax, then selects."""
    hidden = hidden_states()
    router = router_of("qwen3_moe", "Qwen3MoeTopKRouter", norm_topk_prob=renormalize)
    logits, weights, ids = router(hidden)
    found = calculate_topk(logits, TOP_K, use_sigmoid=False, renormalize=renormalize)
    compare(hidden, router, found, (weights, ids))


def test_gpt_oss():
    """It selects, then takes the softmax of the selected."""
    hidden, router = hidden_states(), router_of("gpt_oss", "GptOssTopKRouter")
    logits, weights, ids = router(hidden)
    act = {"pre_act": False, "post_act": True}
    found = calculate_topk(logits, TOP_K, use_sigmoid=False, renormalize=False, **act)
    compare(hidden, router, found, (weights, ids))


def test_llama4():
    """It selects, then takes the sigmoid of the selected. The model keeps a row of all experts."""
    hidden, router = hidden_states(), router_of("llama4", "Llama4Router")
    scores, logits = router(hidden)
    ids = scores.topk(TOP_K, dim=1).indices
    act = {"pre_act": False, "post_act": True}
    found = calculate_topk(logits, TOP_K, use_sigmoid=True, renormalize=False, **act)
    compare(hidden, router, found, (scores.gather(1, ids), ids))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("model", "name"),
    [("deepseek_v3", "DeepseekV3TopkRouter"), ("glm4_moe", "Glm4MoeTopkRouter")],
)
def test_groups_bias_and_scale(model, name, renormalize):
    """It takes those two of four groups whose two best biased scores are highest."""
    groups = {"n_group": 4, "topk_group": 2}
    scaling = {"norm_topk_prob": renormalize, "routed_scaling_factor": 2.5}
    hidden, router = hidden_states(), router_of(model, name, **groups, **scaling)
    logits, weights, ids = router(hidden)
    found_weights, found_ids = moe_ops.topk_routing(
        logits,
        TOP_K,
        selection_bias=router.e_score_correction_bias,
        score_function="sigmoid",
        renormalize=renormalize,
        num_groups=4,
        top_groups=2,
        group_score="top2_sum",
        scaling_factor=2.5,
    )
    compare(hidden, router, (found_weights, found_ids.long()), (weights, ids))
