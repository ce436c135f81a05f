# SPDX-License-Identifier: Apache-2.0
"""Experts after quantize_fp8_(): what they compute, and what becomes of their states."""

import pytest
import torch

from moe_ops.layers.experts import Experts
from testing.lora_problem import NUM_EXPERTS


def test_quantised_experts_in_a_state_dict():
    experts = Experts(NUM_EXPERTS, 150, 130).quantize_fp8_()
    state = experts.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "gate_up_proj": torch.float8_e4m3fn,
        "gate_up_proj_scale": torch.float32,
        "down_proj": torch.float8_e4m3fn,
        "down_proj_scale": torch.float32,
    }
    other = Experts(NUM_EXPERTS, 150, 130).quantize_fp8_()
    other.load_state_dict(state)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name].float(), value.float())
    assert set(Experts(2, 4, 4).state_dict()) == {"gate_up_proj", "down_proj"}


def test_quantised_experts_alone_are_refused_with_what_to_do():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    for rows in (torch.randn(3, 8), torch.randn(3, 8, requires_grad=True)):
        with pytest.raises(
            ValueError, match=r"forward: .*moe_ops\.layers\.lora\.LoraExperts computes"
        ):
            experts(rows, torch.zeros(3, 1).int(), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"reset_parameters: .* not quantised, got FP8 ones"):
        experts.reset_parameters()
    with pytest.raises(ValueError, match="are not quantised yet, got gate_up_proj_scale"):
        experts.quantize_fp8_()
    biased = Experts(NUM_EXPERTS, 8, 6, bias=True)
    with pytest.raises(ValueError, match="got gate_up_proj_bias"):
        biased.quantize_fp8_()
    assert biased.gate_up_proj.dtype == torch.float32


def test_quantised_experts_keep_their_codes_where_a_model_is_converted():
    experts = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), experts)
    for convert in (model.bfloat16, model.double, lambda: model.to(torch.float16), model.cpu):
        convert()
        assert model[0].weight.dtype != torch.float32
        for name, tensor in experts.state_dict().items():
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert all(tensor.is_meta for tensor in experts.to("meta").state_dict().values())
    assert Experts(NUM_EXPERTS, 8, 6).bfloat16().down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
def test_states_of_codes_and_of_weights_are_not_mistaken_for_each_other(strict):
    plain, quantised = (Experts(NUM_EXPERTS, 8, 6) for _ in range(2))
    quantised.quantize_fp8_()
    with pytest.raises(RuntimeError, match="expected no FP8 weights in gate_up_proj, got FP8 ones"):
        plain.load_state_dict(quantised.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="expected FP8 weights in down_proj, got other ones"):
        quantised.load_state_dict(Experts(NUM_EXPERTS, 8, 6).state_dict(), strict=strict)
    again = Experts(NUM_EXPERTS, 8, 6).quantize_fp8_()
    again.load_state_dict(quantised.state_dict(), strict=strict)
    for name, tensor in quantised.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name
