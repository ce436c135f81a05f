# SPDX-License-Identifier: Apache-2.0
"""The Qwen3-MoE blocks take their weights from transformers' block and give its numbers."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from moe_ops.compat.kernels.tuning import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.compat.reference.moe_block import (
    Qwen3MoeFusedGroupedGEMMBlock,
    Qwen3MoeGroupedGEMMBlock,
)
from testing.checks import assert_close
from testing.compat_blocks import (
    BLOCKS,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    TOP_K,
    WEIGHTS,
    Qwen3MoeListBlock,
    filled,
    gradients,
    qwen3_block,
    qwen3_config,
    tangents_of,
    tokens,
)

blocks = pytest.mark.parametrize("name", BLOCKS)


def make(name: str, hf: Any) -> Any:
    block_class, given = BLOCKS[name]
    return block_class.from_hf(hf, **given)


def transformers_weights(hf: Any) -> list[torch.Tensor]:
    return [hf.gate.weight, hf.experts.gate_up_proj, hf.experts.down_proj]


@blocks
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_equals_transformers(name, norm_topk_prob):
    hf = qwen3_block(norm_topk_prob)
    block, x = make(name, hf), tokens(2, 7)
    expected = hf(x), hf.gate(x)[0]
    tangents = tangents_of(*expected)
    outputs = block(x)
    assert_close(outputs[0], expected[0], what="hidden_states")
    assert_close(outputs[1], expected[1], what="router_logits")
    got = gradients(outputs, [x, *(getattr(block, weight) for weight in WEIGHTS)], tangents)
    want = gradients(expected, [x, *transformers_weights(hf)], tangents)
    for what, actual, reference in zip(("input", *WEIGHTS), got, want, strict=True):
        assert_close(actual, reference, what=f"gradient of {what}")


@blocks
def test_equals_transformers_in_bf16(name):
    hf = qwen3_block(dtype=torch.bfloat16)
    with torch.no_grad():
        # Experts 1 and 2 tie. The block must choose the one that transformers chooses.
        hf.gate.weight[2] = hf.gate.weight[1]
    x = tokens(2, 40, dtype=torch.bfloat16)
    found = make(name, hf)(x, return_intermediates=True)
    assert ((found.topk_ids == 1).any(1) != (found.topk_ids == 2).any(1)).any()
    assert found.output.dtype == torch.bfloat16
    assert_close(found.output, hf(x))
    assert torch.equal(found.router_logits, hf.gate(x)[0])
    assert torch.equal(found.topk_weights, hf.gate(x)[1])
    assert torch.equal(found.topk_ids, hf.gate(x)[2])


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_router_is_transformers(norm_topk_prob):
    hf, x = qwen3_block(norm_topk_prob), tokens(14)
    block = make("torch", hf)
    for actual, expected in zip(block.run_router(x), hf.gate(x), strict=True):
        assert torch.equal(actual, expected)


@blocks
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (2, 0)])
def test_hardly_any_token(name, shape):
    hf, x = qwen3_block(), tokens(*shape)
    block = make(name, hf)
    output, router_logits = block(x)
    assert output.shape == (*shape, HIDDEN_SIZE)
    assert_close(output, hf(x))
    assert_close(router_logits, hf.gate(x)[0])
    output.backward(torch.ones_like(output))
    assert (block.down_proj.grad.abs().sum((1, 2)) > 0).sum() == (TOP_K if output.numel() else 0)


@blocks
def test_intermediates(name):
    hf, x = qwen3_block(), tokens(2, 7)
    block = make(name, hf)
    found = block(x, return_intermediates=True)
    router_logits, topk_weights, topk_ids = hf.gate(x)
    assert_close(found.router_logits, router_logits)
    assert_close(found.topk_weights, topk_weights)
    slots = topk_ids.flatten()
    order = torch.argsort(slots, stable=True)
    assert found.topk_ids.tolist() == topk_ids.tolist()
    assert found.token_counts.tolist() == torch.bincount(slots, minlength=NUM_EXPERTS).tolist()
    assert found.gather_indices.tolist() == order.tolist()

    experts = slots[order].tolist()
    inputs = x.view(-1, HIDDEN_SIZE)[order // TOP_K]
    pairs = list(zip(inputs, experts, strict=True))
    first = torch.stack([hf.experts.gate_up_proj[e] @ row for row, e in pairs])
    gate, up = first[:, :INTERMEDIATE_SIZE], first[:, INTERMEDIATE_SIZE:]
    activation = F.silu(gate) * up
    pairs = list(zip(activation, experts, strict=True))
    second = torch.stack([hf.experts.down_proj[e] @ row for row, e in pairs])
    unpermuted = torch.empty_like(second).index_copy(0, order, second)
    assert_close(found.first_gemm, first, what="first_gemm")
    assert_close(found.activation, activation, what="activation")
    assert_close(found.second_gemm, unpermuted if block.permute_y else second, what="second_gemm")
    assert_close(found.unpermuted, unpermuted, what="unpermuted")
    assert_close(found.output, hf(x), what="output")
    assert torch.equal(found.output, block(x)[0])
    # They are not detached: an auxiliary loss may use any of them.
    assert found.activation.grad_fn is not None


@blocks
def test_from_hf_of_a_list_of_experts(name):
    old = filled(Qwen3MoeListBlock(qwen3_config()))
    block, x = make(name, old), tokens(2, 7)
    block.check_weights(old)
    assert_close(block(x)[0].view(-1, HIDDEN_SIZE), old(x.view(-1, HIDDEN_SIZE)))
    with torch.no_grad():
        old.experts[3].up_proj.weight[1, 2] = 7.0
    with pytest.raises(ValueError, match=rf"gate_up_proj\[3, {INTERMEDIATE_SIZE + 1}, 2\]"):
        block.check_weights(old)


@blocks
def test_from_hf_copies_what_the_block_has(name):
    hf = qwen3_block(dtype=torch.bfloat16).eval()
    hf.experts.down_proj.requires_grad_(False)
    block = make(name, hf)
    assert not block.training
    assert {n: (p.dtype, p.requires_grad) for n, p in block.named_parameters()} == {
        "gate": (torch.bfloat16, True),
        "gate_up_proj": (torch.bfloat16, True),
        "down_proj": (torch.bfloat16, False),
    }
    with torch.no_grad():
        block.gate_up_proj.zero_()
    assert hf.experts.gate_up_proj.count_nonzero() > 0


def test_constructor_takes_tensors_and_parameters():
    hf = qwen3_block()
    gate, gate_up_proj, down_proj = transformers_weights(hf)
    frozen = nn.Parameter(down_proj.detach(), requires_grad=False)
    block = Qwen3MoeGroupedGEMMBlock(hf.experts.config, gate.detach(), gate_up_proj, frozen)
    assert block.gate.requires_grad
    assert block.gate.data_ptr() == gate.data_ptr()
    assert block.gate_up_proj is gate_up_proj
    assert block.down_proj is frozen


def test_state_dict_and_copy():
    hf, x = qwen3_block(), tokens(1, 5)
    block = make("permute_x", hf)
    other = copy.deepcopy(make("torch", qwen3_block()))
    other.load_state_dict(block.state_dict())
    other.check_weights(hf)
    assert_close(other(x)[0], hf(x))


def test_check_weights_says_where():
    hf = qwen3_block()
    block = make("torch", hf)
    block.check_weights(hf)
    with torch.no_grad():
        block.down_proj[4, 1, 2] = 9.0
        block.down_proj[5] += 1
        hf.experts.down_proj[4, 1, 2] = 8.0
    with pytest.raises(ValueError, match="differs") as error:
        block.check_weights(hf)
    count, total = HIDDEN_SIZE * INTERMEDIATE_SIZE + 1, block.down_proj.numel()
    assert str(error.value) == (
        f"Qwen3MoeGroupedGEMMBlock.check_weights: down_proj differs in {count} of {total} numbers, "
        f"first in down_proj[4, 1, 2]: expected 8.0, got 9.0"
    )


def test_check_weights_takes_nan_for_nan_and_refuses_another_dtype_or_shape():
    hf = qwen3_block()
    with torch.no_grad():
        hf.gate.weight[0, 0] = float("nan")
    block = make("torch", hf)
    block.check_weights(hf)
    with pytest.raises(ValueError, match=r"gate of dtype torch\.bfloat16, got torch\.float32"):
        block.check_weights(copy.deepcopy(hf).bfloat16())
    hf.experts.down_proj = nn.Parameter(hf.experts.down_proj[:, :3])
    expected = rf"expected down_proj of shape \({NUM_EXPERTS}, 3, {INTERMEDIATE_SIZE}\)"
    with pytest.raises(ValueError, match=expected):
        block.check_weights(hf)


def test_rejects_weights_of_another_shape():
    hf = qwen3_block()
    gate, gate_up_proj, down_proj = transformers_weights(hf)
    config = hf.experts.config
    for arguments, name in (
        ((gate.mT, gate_up_proj, down_proj), "gate"),
        ((gate, gate_up_proj[:, 1:], down_proj), "gate_up_proj"),
        ((gate, gate_up_proj, down_proj.mT), "down_proj"),
    ):
        with pytest.raises(ValueError, match=f"Qwen3MoeGroupedGEMMBlock: expected {name} of shape"):
            Qwen3MoeGroupedGEMMBlock(config, *arguments)


@pytest.mark.parametrize("method", ["from_hf", "check_weights"])
def test_rejects_what_is_no_block(method):
    block = make("torch", qwen3_block())
    with pytest.raises(TypeError, match=f"{method}: expected moe_block .* got Linear"):
        getattr(block, method)(nn.Linear(3, 3))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_rejects_hidden_states_of_other_dimensions(shape):
    with pytest.raises(ValueError, match=r"hidden_states of shape .*got \("):
        make("neither", qwen3_block())(tokens(*shape))
    with pytest.raises(ValueError, match="expected hidden_states of shape"):
        make("torch", qwen3_block())(torch.zeros(1, 2, HIDDEN_SIZE + 1))


@pytest.mark.parametrize(
    "config",
    [
        {"kernel_config_fwd": KernelConfigForward()},
        {"kernel_config_bwd_dW": KernelConfigBackward_dW()},
        {"kernel_config_bwd_dX": KernelConfigBackward_dX()},
    ],
    ids=str,
)
def test_rejects_a_configuration_with_autotune(config):
    (name,) = config
    with pytest.raises(ValueError, match=f"expected {name}=None with autotune=True"):
        Qwen3MoeFusedGroupedGEMMBlock.from_hf(qwen3_block(), **config)


def test_rejects_the_configuration_of_another_gemm():
    config = KernelConfigBackward_dX()
    with pytest.raises(TypeError, match=r"expected kernel_config_bwd_dW to be a .*_dW, got .*_dX"):
        Qwen3MoeFusedGroupedGEMMBlock.from_hf(
            qwen3_block(),
            autotune=False,
            kernel_config_bwd_dW=config,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_config_without_transformers(monkeypatch, hidden_act):
    """Any object with the config's attributes will do. Only silu needs no transformers."""
    hf, x = qwen3_block(), tokens(2, 7)
    names = (
        "num_experts", "num_experts_per_tok", "norm_topk_prob", "hidden_size",
        "moe_intermediate_size",
    )  # fmt: skip
    given = {name: getattr(hf.experts.config, name) for name in names}
    config: Any = types.SimpleNamespace(**given, hidden_act=hidden_act)
    weights: Any = transformers_weights(hf)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.activations", None)
    if hidden_act != "silu":
        with pytest.raises(ImportError):
            Qwen3MoeFusedGroupedGEMMBlock(config, *weights)
        return
    block = Qwen3MoeFusedGroupedGEMMBlock(config, *weights)
    assert_close(block(x)[0], hf(x))
