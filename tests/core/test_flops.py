# SPDX-License-Identifier: Apache-2.0
"""torch.utils.flop_counter counts the ops by their formulas. It is imported lazily."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe_ops

moe = torch.ops.moe


def count(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    counted = counter.get_flop_counts().get("Global", {})
    return {str(op): flops for op, flops in counted.items()}


@pytest.mark.parametrize("permute_x", [False, True])
@pytest.mark.parametrize("grads", [("input",), ("weight",), ("input", "weight")], ids=str)
def test_forward_and_backward_of_grouped_gemm(permute_x, grads):
    top_k, num_tokens, in_features, out_features = 2, 6, 8, 10
    num_rows = num_tokens * top_k
    leaves = {
        "input": torch.randn(num_tokens if permute_x else num_rows, in_features),
        "weight": torch.randn(3, out_features, in_features),
    }
    for name in grads:
        leaves[name].requires_grad_()
    gather_indices = torch.randperm(num_rows).int()
    # One row is dropped. The formula counts it, because it may not read the counts.
    counts = torch.tensor([4, 0, 7])
    found = count(
        lambda: (
            moe.grouped_gemm(
                *leaves.values(), counts, gather_indices, top_k=top_k, permute_x=permute_x
            )
            .sum()
            .backward()
        )
    )
    product = 2 * num_rows * in_features * out_features
    backward_ops = {"input": "moe.grouped_gemm_dx", "weight": "moe.grouped_gemm_dw"}
    expected = {"moe.grouped_gemm": product, **{backward_ops[name]: product for name in grads}}
    assert found == expected


def test_router_gradient_needs_the_same_product():
    topk_weights = torch.randn(6, 1, requires_grad=True)
    rows, weight, counts = torch.randn(6, 8), torch.randn(2, 10, 8), torch.tensor([3, 3])
    found = count(
        lambda: moe.grouped_gemm(rows, weight, counts, None, topk_weights).sum().backward()
    )
    assert found == {"moe.grouped_gemm": 960, "moe.grouped_gemm_dx": 960}


def test_quantised_weights_count_as_others_do():
    rows = torch.randn(6, 8, requires_grad=True)
    weight = moe_ops.quantize_weight(torch.randn(2, 10, 8), "nf4")
    found = count(lambda: moe_ops.grouped_gemm(rows, weight, torch.tensor([3, 3])).sum().backward())
    assert found == {"moe.grouped_gemm_quantized": 960, "moe.grouped_gemm_quantized_dx": 960}


EXPERTS_GRADS = {
    # GEMMs in the backward of the down and of the up projection, None where that op does not run. The
    # unit is a GEMM of R x H x I. Gate and up are two of them.
    ("hidden_states",): (1, 2),
    ("gate_up_proj",): (1, 2),
    ("down_proj",): (1, None),
    ("topk_weights",): (1, None),
    ("gate_up_bias",): (1, 0),
    ("down_bias",): (0, None),
    ("hidden_states", "gate_up_proj", "down_proj", "topk_weights"): (2, 4),
}


@pytest.mark.parametrize("recompute", ["none", "pre_activation"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grads", EXPERTS_GRADS, ids=str)
def test_fused_experts(grads, gated, recompute):
    num_tokens, hidden_size, intermediate_size, num_experts, top_k = 6, 8, 5, 3, 2
    width = 2 * intermediate_size if gated else intermediate_size
    tensors = {
        "hidden_states": torch.randn(num_tokens, hidden_size),
        "gate_up_proj": torch.randn(num_experts, width, hidden_size),
        "down_proj": torch.randn(num_experts, hidden_size, intermediate_size),
        "topk_ids": torch.randint(-1, num_experts, (num_tokens, top_k)),
        "topk_weights": torch.randn(num_tokens, top_k),
        "gate_up_bias": torch.randn(num_experts, width),
        "down_bias": torch.randn(num_experts, hidden_size),
    }
    unit = 2 * num_tokens * top_k * hidden_size * intermediate_size
    up = width // intermediate_size
    call = {"gated": gated, "recompute": recompute}
    assert count(lambda: moe_ops.fused_experts(**tensors, **call)) == {
        "moe.fused_experts": (up + 1) * unit
    }
    for name in grads:
        tensors[name].requires_grad_()
    found = count(lambda: moe_ops.fused_experts(**tensors, **call).sum().backward())
    of_down, of_up = EXPERTS_GRADS[grads]
    if recompute == "pre_activation" and of_down:
        of_down += up
    expected = {"moe.fused_experts_forward": (up + 1) * unit}
    expected["moe.fused_experts_down_backward"] = of_down * unit
    if of_up is not None:
        # z is half as wide where there is no gate.
        expected["moe.fused_experts_up_backward"] = of_up // (1 if gated else 2) * unit
    assert found == expected


def test_router_weights_before_the_up_projection():
    x, gate_up, down = torch.randn(6, 8), torch.randn(3, 10, 8), torch.randn(3, 8, 5)
    ids, weights = torch.randint(3, (6, 2)), torch.randn(6, 2, requires_grad=True)
    unit = 2 * 6 * 2 * 8 * 5
    found = count(
        lambda: (
            moe_ops.fused_experts(x, gate_up, down, ids, weights, weights_before=True)
            .sum()
            .backward()
        )
    )
    assert found == {
        "moe.fused_experts_forward": 3 * unit,
        "moe.fused_experts_down_backward": unit,
        "moe.fused_experts_up_backward": 2 * unit,
    }


def test_other_ops_count_nothing():
    rows, indices = torch.randn(6, 8, requires_grad=True), torch.randperm(12).int()
    assert count(lambda: moe.permute(rows, indices, 2).sum().backward()) == {}


@pytest.mark.parametrize("first", ["moe_ops", "torch.utils.flop_counter"])
def test_registered_whichever_is_imported_first(first):
    script = f"""
import torch, {first}, moe_ops
import torch.utils.flop_counter as flop_counter
with flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.moe.grouped_gemm(torch.ones(4, 3), torch.ones(1, 5, 3), torch.tensor([4]))
assert counter.get_total_flops() == 2 * 4 * 3 * 5, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
