# SPDX-License-Identifier: Apache-2.0
"""Builds small MoE blocks of transformers' own classes, and runs a step of a block or our layer."""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN_SIZE, NUM_EXPERTS = 32, 8

_QWEN = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
_LOCAL = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 24}

# Config class, block class, and what the config is given. gpt-oss is square, as the released ones
# are: shapes do not tell whether its down projection is transposed.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", {**_QWEN, "norm_topk_prob": True}),
    "qwen3_moe_unnormalised": (
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {**_QWEN, "norm_topk_prob": False},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {**_QWEN, "shared_expert_intermediate_size": 40},
    ),
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", _LOCAL),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeSparseMoeBlock",
        {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 4, "intermediate_size": 24},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", _DEEPSEEK),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeMoE", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "glm4_moe_grouped": ("Glm4MoeConfig", "Glm4MoeMoE", {**_DEEPSEEK, "norm_topk_prob": False}),
    "gpt_oss": ("GptOssConfig", "GptOssMLP", {**_LOCAL, "intermediate_size": HIDDEN_SIZE}),
    "llama4_text": ("Llama4TextConfig", "Llama4TextMoe", {**_LOCAL, "num_experts_per_tok": 1}),
    "llama4_text_top2": ("Llama4TextConfig", "Llama4TextMoe", _LOCAL),
}


def make_config(name: str):
    config_class, _, options = MODELS[name]
    return getattr(transformers, config_class)(
        hidden_size=HIDDEN_SIZE, experts_implementation="eager", **options
    )


def make_block(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the block, with weights so wide that selection bias and gpt-oss's clamp are felt."""
    config = make_config(name)
    module = type(config).__module__.replace("configuration_", "modeling_")
    block = getattr(importlib.import_module(module), MODELS[name][1])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.normal_(std=0.4, generator=generator)
    return block.to(dtype)


def router_of(block: Any) -> nn.Module:
    return block.router if hasattr(block, "router") else block.gate


def routing_of(block: nn.Module, tokens: Tensor) -> Tensor:
    """Return the router weights of transformers' router, spread over all experts (T, E)."""
    if type(block).__name__ == "Llama4TextMoe":
        return router_of(block)(tokens)[0]
    logits, topk_weights, topk_ids = router_of(block)(tokens)
    return spread(topk_weights, topk_ids, logits.shape[1])


def spread(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return each expert's weight (T, E), with zero where it was not chosen."""
    zeros = topk_weights.new_zeros(topk_weights.shape[0], num_experts)
    return zeros.scatter(1, topk_ids.long(), topk_weights)


def make_hidden_states(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 11)
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*shape, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def tangent_of(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def run_block(block: nn.Module, hidden_states: Tensor) -> SimpleNamespace:
    """Return output, logits and gradients by name of transformers' block."""
    found: list[Tensor] = []
    is_llama4 = type(block).__name__ == "Llama4TextMoe"
    hook = router_of(block).register_forward_hook(
        lambda module, args, outputs: found.append(outputs[1 if is_llama4 else 0])
    )
    output = block(hidden_states)
    hook.remove()
    output = output[0] if isinstance(output, tuple) else output
    return _with_gradients(block, hidden_states, output.reshape(hidden_states.shape), found[0])


def run_layer(layer: nn.Module, hidden_states: Tensor, call=None) -> SimpleNamespace:
    """Return the same of our layer, called by `call` where that is given (compiled, checkpointed)."""
    output, logits = (layer if call is None else call)(hidden_states)
    return _with_gradients(layer, hidden_states, output, logits)


def _with_gradients(
    module: nn.Module, hidden_states: Tensor, output: Tensor, logits: Tensor
) -> SimpleNamespace:
    """Return them with gradients: output and logits have one random tangent each."""
    wanted = {"hidden_states": hidden_states, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(
        [output, logits],
        list(wanted.values()),
        [tangent_of(output, 2), tangent_of(logits, 3)],
    )
    named = dict(zip(wanted, gradients, strict=True))
    return SimpleNamespace(output=output.detach(), logits=logits.detach(), gradients=named)
