# SPDX-License-Identifier: Apache-2.0
"""Each test runs a usage example of the block that ours stands in for.

They differ from the page in their import paths, in what it leaves out (ellipses, a config, a loss
function), and in device, dtype and sizes, so that they run on a CPU. Each test then checks what its
example gives.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import moe_ops
from moe_ops.layers import load_balancing_loss
from testing.checks import assert_close
from testing.compat_blocks import TOP_K, filled, qwen3_config

config = qwen3_config()


@pytest.fixture
def hf_moe():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    # In transformers the model initialises the weights, not the block.
    return filled(Qwen3MoeSparseMoeBlock(config))


@pytest.fixture
def fused_moe(hf_moe):
    from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock

    return Qwen3MoeFusedGroupedGEMMBlock.from_hf(hf_moe)


def compute_load_balance_loss(router_logits):
    return load_balancing_loss(router_logits, config.num_experts, config.num_experts_per_tok)


def test_creating_from_a_hugging_face_model():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock

    # Load HuggingFace MoE block
    hf_moe = Qwen3MoeSparseMoeBlock(config)
    filled(hf_moe)

    # Create Triton-accelerated block with full fusion
    fused_moe = Qwen3MoeFusedGroupedGEMMBlock.from_hf(
        hf_moe,
        permute_x=True,  # Fuse input permutation
        permute_y=True,  # Fuse output unpermutation
        autotune=True,
    )

    fused_moe.check_weights(hf_moe)
    hidden_states = torch.randn(2, 8, 32)
    assert_close(fused_moe(hidden_states)[0], hf_moe(hidden_states))


def test_forward_pass(hf_moe, fused_moe):
    hidden_states = torch.randn(2, 8, 32, device="cpu", dtype=torch.float32)

    # Forward pass
    output, router_logits = fused_moe(hidden_states)

    # Use router_logits for load balancing loss if needed
    load_balance_loss = compute_load_balance_loss(router_logits)

    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    assert_close(output, hf_moe(hidden_states))
    expected_logits = hf_moe.gate(hidden_states)[0]
    assert_close(router_logits, expected_logits)
    expected: Any = load_balancing_loss_func((expected_logits,), config.num_experts, TOP_K)
    assert_close(load_balance_loss, expected)
    load_balance_loss.backward()
    expected.backward()
    assert_close(fused_moe.gate.grad, hf_moe.gate.weight.grad)


def test_manual_kernel_configuration(hf_moe):
    from moe_ops.compat.kernels.tuning import (
        KernelConfigBackward_dW,
        KernelConfigBackward_dX,
        KernelConfigForward,
    )
    from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock

    # Define custom kernel configurations
    fwd_config = KernelConfigForward(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=4)
    bwd_dW_config = KernelConfigBackward_dW(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128)
    bwd_dX_config = KernelConfigBackward_dX(BLOCK_M=128, BLOCK_N=32, BLOCK_K=64)

    # Create block with manual configs
    fused_moe = Qwen3MoeFusedGroupedGEMMBlock.from_hf(
        hf_moe,
        autotune=False,
        kernel_config_fwd=fwd_config,
        kernel_config_bwd_dW=bwd_dW_config,
        kernel_config_bwd_dX=bwd_dX_config,
    )

    given: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_ops, "grouped_gemm", recorded(moe_ops.grouped_gemm, given))
        output, _ = fused_moe(torch.ones(1, 2, 32))
    assert given == [moe_ops.kernel_config(fwd_config, bwd_dX_config, bwd_dW_config)] * 2
    assert_close(output, hf_moe(torch.ones(1, 2, 32)))


def recorded(grouped_gemm, given):
    def call(*args, **kwargs):
        given.append(kwargs["kernel_config"])
        return grouped_gemm(*args, **kwargs)

    return call


def test_memory_efficient_gradient_computation(hf_moe):
    from moe_ops.compat.reference.moe_block import Qwen3MoeFusedGroupedGEMMBlock

    # Only compute weight gradients (for fine-tuning frozen activations)
    fused_moe = Qwen3MoeFusedGroupedGEMMBlock.from_hf(hf_moe, dW_only=True)

    hidden_states: Any = torch.randn(2, 8, 32, requires_grad=True)
    tangent = torch.randn(2, 8, 32)
    (expected,) = torch.autograd.grad(hf_moe(hidden_states), hidden_states, tangent)
    hf_moe(hidden_states.detach()).backward(tangent)
    output, _ = fused_moe(hidden_states)
    output.backward(tangent)
    assert hidden_states.grad is None
    for weight, name in (
        (fused_moe.gate, "gate.weight"),
        (fused_moe.gate_up_proj, "experts.gate_up_proj"),
        (fused_moe.down_proj, "experts.down_proj"),
    ):
        assert weight.grad is not None
        assert_close(weight.grad, hf_moe.get_parameter(name).grad, what=name)

    # Only compute input gradients (for frozen weights)
    fused_moe = Qwen3MoeFusedGroupedGEMMBlock.from_hf(hf_moe, dX_only=True)

    hidden_states = hidden_states.detach().requires_grad_()
    output, _ = fused_moe(hidden_states)
    output.backward(tangent)
    assert_close(hidden_states.grad, expected)
    assert all(parameter.grad is None for parameter in fused_moe.parameters())
