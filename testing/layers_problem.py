# SPDX-License-Identifier: Apache-2.0
"""Builds layers and blocks of experts with their routers, and runs a step of each.

T tokens, H hidden size, I intermediate size, E experts, K top_k.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ops.compat.reference.moe_block import (
    Qwen3MoeFusedGroupedGEMMBlock,
    Qwen3MoeGroupedGEMMBlock,
)
from moe_ops.layers import Experts, MoE, Router
from moe_ops.layers.lora import LoraExperts
from testing import checks
from testing.on_device import DEVICE

# Several tiles, and rows that descriptors can read.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 96, 8, 2
SHAPE = (2, 150, HIDDEN)

_QWEN = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": INTERMEDIATE,
    "norm_topk_prob": True,
}
_LOCAL = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "intermediate_size": INTERMEDIATE,
}
# What MoE.from_config reads of transformers' configs.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _QWEN,
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTERMEDIATE,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "gpt_oss": _LOCAL,
    "llama4_text": _LOCAL,
}


def config_of(name: str) -> Any:
    return types.SimpleNamespace(
        model_type=name, hidden_size=HIDDEN, hidden_act="silu", **CONFIGS[name]
    )


class LoraLayer(nn.Module):
    """A router, and frozen experts with adapters on both projections."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(HIDDEN, EXPERTS, TOP_K, renormalize=True)
        self.experts = LoraExperts(Experts(EXPERTS, HIDDEN, INTERMEDIATE), rank=8, lora_alpha=8)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, HIDDEN)
        router_logits, topk_weights, topk_ids = self.router(tokens)
        return self.experts(tokens, topk_ids, topk_weights), router_logits


def qwen3_block(**options: Any) -> nn.Module:
    return Qwen3MoeFusedGroupedGEMMBlock(
        config_of("qwen3_moe"),
        gate=torch.empty(EXPERTS, HIDDEN),
        gate_up_proj=torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        down_proj=torch.empty(EXPERTS, HIDDEN, INTERMEDIATE),
        **options,
    )


def llama4_config(hidden_size: int, sizes: dict[str, int]) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="the Llama 4 block is a subclass of transformers' Llama4TextMoe"
    )
    return transformers.Llama4TextConfig(hidden_size=hidden_size, **sizes)


def llama4_block(
    hidden_size: int = HIDDEN, sizes: dict[str, int] | None = None, **options: Any
) -> Any:
    config = llama4_config(hidden_size, sizes or _LOCAL)
    from moe_ops.compat.reference.layers.llama4_moe import Llama4GroupedGemmTextMoe

    return Llama4GroupedGemmTextMoe(config, **options)


MODULES: dict[str, Callable[..., nn.Module]] = {
    "compat-qwen3": qwen3_block,
    "compat-qwen3-unfused": lambda: qwen3_block(permute_x=False, permute_y=False),
    "compat-llama4": llama4_block,
    **{f"moe-{name}": lambda name=name: MoE.from_config(config_of(name)) for name in CONFIGS},
    "lora": LoraLayer,
}


def make(name: str, **options: Any) -> nn.Module:
    """Return a module in fp32 on the CPU. bf16 holds its weights, and every stage has size 1."""
    module = MODULES[name](**options)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.normal_(std=fan_in**-0.5)
    return module.bfloat16().float()


def plain(module: nn.Module) -> nn.Module:
    """Return a module that computes the same in torch's own ops, or the module where there is none."""
    if isinstance(module, Qwen3MoeFusedGroupedGEMMBlock):
        weights = module.gate, module.gate_up_proj, module.down_proj
        return Qwen3MoeGroupedGEMMBlock(module.config, *weights)
    if type(module).__name__ == "Llama4GroupedGemmTextMoe":
        config = llama4_config(HIDDEN, _LOCAL)
        block: nn.Module = type(module).__mro__[1](config)
        block.load_state_dict(module.state_dict())
        return block
    return module


def on_device(module: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(module).to(DEVICE, dtype)


def make_tokens(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Return tokens on the CPU, exact in bf16, whose experts rounding to bf16 does not change."""
    tokens = torch.randn(shape).bfloat16().float()
    rows = tokens.view(-1, HIDDEN)
    for _ in range(100):
        with torch.no_grad():
            best = module(tokens)[1].reshape(len(rows), EXPERTS).topk(TOP_K + 1).values
        last, following = best[:, TOP_K - 1], best[:, TOP_K]
        gap = 2 * torch.finfo(torch.bfloat16).eps * torch.maximum(last.abs(), following.abs())
        undecided = (last - following <= gap).nonzero().flatten()
        if not len(undecided):
            return tokens
        rows[undecided] = torch.randn(len(undecided), HIDDEN).bfloat16().float()
    raise AssertionError(f"{len(undecided)} tokens stay undecided")


def tangents_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of the output and of the router's logits, exact in bf16.

    An auxiliary loss gives the logits a gradient.
    """
    num_tokens = tokens.numel() // HIDDEN
    drawn = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, EXPERTS)
    return drawn[0].bfloat16().float(), drawn[1].bfloat16().float()


Step = dict[str, Tensor]
Call = Callable[[Tensor], tuple[Tensor, Tensor]]


def step(
    module: nn.Module, tokens: Tensor, tangents: tuple[Tensor, Tensor], call: Call | None = None
) -> Step:
    """Return output, router logits, and the gradients of the input and the parameters, by name."""
    leaves = _leaves(module, tokens)
    outputs, grads = run(module if call is None else call, tokens, tangents)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {**_named(outputs), **dict(zip(leaves, found, strict=True))}


def backward_step(
    module: nn.Module, tokens: Tensor, tangents: tuple[Tensor, Tensor], call: Call
) -> Step:
    """Return the same by .backward(), which reentrant checkpoints insist on."""
    leaves = _leaves(module, tokens)
    for leaf in leaves.values():
        leaf.grad = None
    outputs, grads = run(call, tokens, tangents)
    torch.autograd.backward(outputs, grads)
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == leaves.keys()
    return {**_named(outputs), **found}


def _leaves(module: nn.Module, tokens: Tensor) -> Step:
    assert tokens.requires_grad
    trained = {f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    return {"gradient of the input": tokens, **trained}


def run(
    call: Call, tokens: Tensor, tangents: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    outputs = call(tokens)
    # Blocks differ in how many dimensions their results have.
    grads = [t.to(o).view(o.shape) for o, t in zip(outputs, tangents, strict=True)]
    return outputs, grads


def _named(outputs: tuple[Tensor, Tensor]) -> Step:
    sizes = {"output": HIDDEN, "router_logits": EXPERTS}
    return {
        name: output.detach().reshape(-1, size)
        for (name, size), output in zip(sizes.items(), outputs, strict=True)
    }


def leaf_of(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.detach().to(DEVICE, dtype, copy=True).requires_grad_()


def assert_alike(got: Step, want: Step, dtype: torch.dtype | None = None) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert expected.norm() > 0, name
        checks.assert_close(
            got[name].cpu().view(expected.shape), expected.cpu(), dtype=dtype, what=name
        )
