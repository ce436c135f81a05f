# SPDX-License-Identifier: Apache-2.0
"""What has to come before expert_parallel says so where it comes after."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from moe_ops import quantize_weight
from moe_ops.distributed import ExpertParallel, expert_parallel
from moe_ops.layers import Experts
from moe_ops.layers.lora import LoraExperts

SPREAD = "to be a whole tensor, got a DTensor, which is spread over ranks"
LATE = "before expert_parallel and fully_shard$"


def parallel_model():
    from moe_ops.integrations.transformers import register
    from testing.tiny_models import make_model

    register()
    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_ops")
    return model


def spread(module):
    mesh = init_device_mesh("cpu", (1,))
    if isinstance(module, Experts):
        return parallelize_module(module, mesh, ExpertParallel())
    return expert_parallel(module, mesh)


def check_quantising(rank, world_size):
    from moe_ops.integrations.transformers import dequantize_experts_, quantize_experts_

    model = spread(parallel_model())
    expected = rf"^moe_ops\..*quantize_experts_: expected .*experts\.gate_up_proj {SPREAD}; quantise the model"
    with pytest.raises(TypeError, match=f"{expected} {LATE}"):
        quantize_experts_(model, "nf4")
    model = parallel_model()
    quantize_experts_(model, "nf4")
    spread(model)
    expected = (
        rf"dequantize_experts_: expected .*gate_up_proj\.codes {SPREAD}; dequantise the model"
    )
    with pytest.raises(TypeError, match=f"{expected} {LATE}"):
        dequantize_experts_(model)
    weight = spread(Experts(4, 64, 64).quantize_("nf4")).down_proj
    with pytest.raises(
        TypeError, match=f"dequantize: expected codes {SPREAD}; dequantise it {LATE}"
    ):
        weight.dequantize()


def check_layers(rank, world_size):
    for call, function in (
        (lambda: spread(Experts(4, 64, 64)).quantize_("nf4"), "quantize_weight"),
        (lambda: spread(Experts(4, 64, 64)).quantize_fp8_(), "quantize_fp8"),
        (lambda: quantize_weight(spread(Experts(4, 64, 64)).down_proj, "nf4"), "quantize_weight"),
    ):
        expected = f"^moe_ops.{function}: expected weight {SPREAD}; quantise it {LATE}"
        with pytest.raises(TypeError, match=expected):
            call()
    expected = (
        "expected experts that are not spread over ranks yet, got experts after expert_parallel"
    )
    with pytest.raises(ValueError, match=f"LoraExperts: {expected}; add the adapters first$"):
        LoraExperts(spread(Experts(4, 64, 64)), rank=2)


def check_another_implementation(rank, world_size, name):
    model = spread(parallel_model())
    ids = torch.randint(3, 40, (2, 8))
    before = model(input_ids=ids).logits
    model.set_experts_implementation(name)
    expected = (
        'moe_ops.distributed.ExpertParallel: expected experts that run with experts_implementation="moe_ops", '
        f"got '{name}'; call model.set_experts_implementation(\"moe_ops\")"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        model(input_ids=ids)
    model.set_experts_implementation("moe_ops")
    assert torch.equal(model(input_ids=ids).logits, before)


def check_adapters(rank, world_size, automatic):
    import peft

    from moe_ops.integrations import peft as ours

    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], r=2)
    expected = "expected adapters that PEFT added before expert_parallel, got some around .*experts"
    model = spread(parallel_model())
    if automatic:
        ours.auto()
        try:
            with pytest.raises(ValueError, match=expected):
                peft.get_peft_model(model, config)
        finally:
            ours.auto(False)
        return
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=expected):
        ours.enable(wrapped)
    # In the other order they are computed.
    model = peft.get_peft_model(parallel_model(), config)
    assert ours.enable(model)
    assert isinstance(spread(model), nn.Module)
    model(input_ids=torch.randint(3, 40, (2, 8))).logits.sum().backward()


def test_quantising(ranks):
    ranks(1).run(check_quantising)


def test_layers(ranks):
    ranks(1).run(check_layers)


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_another_implementation(ranks, name):
    ranks(1).run(check_another_implementation, name=name)


@pytest.mark.parametrize("automatic", [False, True])
def test_adapters(ranks, automatic):
    pytest.importorskip("peft", reason="the peft extra is not installed")
    ranks(1).run(check_adapters, automatic=automatic)
