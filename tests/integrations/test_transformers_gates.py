# SPDX-License-Identifier: Apache-2.0
"""Classes of transformers with a gate of their own run as one op, with their own eager numbers."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from moe_ops.integrations.transformers import _GATES, known_activation
from testing.recorders import MoeOps
from testing.tolerances import MODULE_NORM, relative_error

NUM_TOKENS, TOP_K, NUM_EXPERTS = 40, 2, 5
LIMIT = 0.75
# The class, the module of transformers.models that has it, and its activation here.
CLASSES = [
    ("GptOssExperts", "gpt_oss", "swiglu_oai"),
    ("OpenAIPrivacyFilterExperts", "openai_privacy_filter", "swiglu_oai"),
    ("MiniMaxM3VLExperts", "minimax_m3_vl", "swiglu_oai"),
    ("DeepseekV4Experts", "deepseek_v4", "silu"),
    ("HYV4Experts", "hy_v4", "silu"),
    ("Glm5NextTextExperts", "glm5_next", "silu"),
]
over_classes = pytest.mark.parametrize(
    ("class_name", "model", "activation"), CLASSES, ids=[name for name, _, _ in CLASSES]
)


def make_experts(class_name, model):
    """Return experts of transformers' own class, whose limit clamps some of the values here."""
    name = f"transformers.models.{model}.modeling_{model}"
    if importlib.util.find_spec(f"transformers.models.{model}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no transformers.models.{model}")
    torch.manual_seed(0)
    experts = getattr(importlib.import_module(name), class_name)(
        SimpleNamespace(
            num_local_experts=NUM_EXPERTS, num_experts=NUM_EXPERTS, n_routed_experts=NUM_EXPERTS,
            hidden_size=16, intermediate_size=12, moe_intermediate_size=12, hidden_act="silu",
            swiglu_limit=LIMIT, swiglu_alpha=1.702, _experts_implementation="eager",
        )
    )  # fmt: skip
    if hasattr(experts, "limit"):  # gpt-oss's does not come from its config.
        experts.limit = LIMIT
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def run(experts, implementation):
    """Return by name the output and every gradient, and the names of the moe ops that ran."""
    generator = torch.Generator().manual_seed(1)
    experts.config._experts_implementation = implementation
    hidden_states = torch.randn(NUM_TOKENS, 16, generator=generator).requires_grad_()
    ids = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator).requires_grad_()
    tangent = torch.randn(NUM_TOKENS, 16, generator=generator)
    wanted = {"hidden_states": hidden_states, "top_k_weights": weights}
    wanted |= dict(experts.named_parameters())
    with MoeOps() as ops:
        output = experts(hidden_states, ids, weights)
        gradients = torch.autograd.grad(output, list(wanted.values()), tangent)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}, ops.names


def test_every_gate_is_here():
    assert [name for name, _, _ in CLASSES] == list(_GATES)


@over_classes
def test_equals_eager_as_one_op(class_name, model, activation):
    experts = make_experts(class_name, model)
    known = known_activation(experts)
    assert known is not None
    assert (known.name, known.gated, known.limit) == (activation, True, LIMIT)

    expected, ops = run(experts, "eager")
    assert ops == []
    actual, ops = run(experts, "moe_ops")
    assert ops == [
        "fused_experts_forward", "fused_experts_down_backward", "fused_experts_up_backward",
    ]  # fmt: skip
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert value.norm() > 0, f"{name} is zero in eager: the comparison says nothing"
        assert error <= MODULE_NORM[torch.float32], f"{name}: relative error {error:.2e}"


@over_classes
def test_the_limit_clamps_gate_and_up(class_name, model, activation):
    """Both sides of up reach the limit and gate exceeds it, so a clamp left out is seen above."""
    experts = make_experts(class_name, model)
    seen = []
    own = experts._apply_gate

    def watched(z):
        seen.append(z)
        return own(z)

    experts._apply_gate = watched
    run(experts, "eager")
    z = torch.cat(seen)
    gate, up = (z[:, ::2], z[:, 1::2]) if class_name == "GptOssExperts" else z.chunk(2, dim=-1)
    for values in (gate, -gate, up, -up):
        assert 0.05 < (values > LIMIT).float().mean() < 0.95


def test_deepseek_v4_without_its_gate_is_not_fused():
    """A class of that name with a gate from elsewhere, or with another activation, is composed."""
    experts = make_experts("DeepseekV4Experts", "deepseek_v4")
    experts.act_fn = torch.nn.Tanh()
    assert known_activation(experts) is None

    base: Any = type(experts)

    class DeepseekV4Experts(base):
        def _apply_gate(self, z):
            gate, up = z.chunk(2, dim=-1)
            return F.silu(gate) * up

    experts.act_fn = torch.nn.SiLU()
    assert known_activation(experts) is not None
    experts.__class__ = DeepseekV4Experts
    assert known_activation(experts) is None
