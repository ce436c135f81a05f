# SPDX-License-Identifier: Apache-2.0
"""How the configs of transformers describe their models' MoE blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Block:
    """The MoE blocks of a model, as its config describes them."""

    router: dict[str, Any]  # arguments of Router
    experts: dict[str, Any]  # arguments of Experts
    shared_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    transposed: bool = False  # the experts' projections are (num_experts, in, out)
    has_experts: Callable[[int], bool] = lambda _: True


# moe::fused_experts' names for the activations that configs name.
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared",
}  # fmt: skip


def _experts(config: Any, intermediate_size: int) -> dict[str, Any]:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            "moe_ops.layers.MoE.from_config: expected config.hidden_act to be one of "
            f"{', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}"
        )
    activation = _ACTIVATIONS[config.hidden_act]
    return {"intermediate_size": intermediate_size, "activation": activation}


def _qwen3_moe(config: Any) -> Block:
    return Block(
        router={"num_experts": config.num_experts, "renormalize": config.norm_topk_prob},
        experts=_experts(config, config.moe_intermediate_size),
        has_experts=lambda layer_idx: (
            layer_idx not in config.mlp_only_layers
            and (layer_idx + 1) % config.decoder_sparse_step == 0
        ),
    )


def _qwen2_moe(config: Any) -> Block:
    return replace(
        _qwen3_moe(config),
        shared_intermediate_size=config.shared_expert_intermediate_size,
        shared_expert_gate=True,
    )


def _mixtral(config: Any) -> Block:
    if config.router_jitter_noise != 0:
        raise ValueError(
            "moe_ops.layers.MoE.from_config: expected config.router_jitter_noise == 0, "
            f"got {config.router_jitter_noise}; set it to 0 in the config"
        )
    return Block(
        router={"num_experts": config.num_local_experts, "renormalize": True},
        experts=_experts(config, config.intermediate_size),
    )


def _olmoe(config: Any) -> Block:
    return Block(
        router={"num_experts": config.num_experts, "renormalize": config.norm_topk_prob},
        experts=_experts(config, config.intermediate_size),
    )


def _deepseek_v3(config: Any) -> Block:
    return Block(
        router={
            "num_experts": config.n_routed_experts,
            "score_function": "sigmoid",
            "renormalize": config.norm_topk_prob,
            "num_groups": config.n_group,
            "top_groups": config.topk_group,
            "scaling_factor": config.routed_scaling_factor,
            "selection_bias": True,
            "logits_dtype": torch.float32,
        },
        experts=_experts(config, config.moe_intermediate_size),
        shared_intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
        has_experts=lambda layer_idx: layer_idx >= config.first_k_dense_replace,
    )


def _gpt_oss(config: Any) -> Block:
    return Block(
        router={"num_experts": config.num_local_experts, "score_before_topk": False, "bias": True},
        experts={
            "intermediate_size": config.intermediate_size,
            "activation": "swiglu_oai",
            "interleaved": True,
            "bias": True,
            # A constant of transformers' class too: its config has no say in it.
            "activation_limit": 7.0,
        },
        transposed=True,
    )


def _llama4_text(config: Any) -> Block:
    return Block(
        router={
            "num_experts": config.num_local_experts,
            "score_function": "sigmoid",
            "score_before_topk": False,
        },
        experts={**_experts(config, config.intermediate_size), "weights_before": True},
        shared_intermediate_size=config.intermediate_size,
        transposed=True,
        has_experts=lambda layer_idx: layer_idx in config.moe_layers,
    )


BLOCKS: dict[str, Callable[[Any], Block]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4_text,
}

# transformers' blocks, several of which have the same names and shapes in their state.
CLASSES = {
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "mixtral": "MixtralSparseMoeBlock",
    "olmoe": "OlmoeSparseMoeBlock",
    "deepseek_v3": "DeepseekV3MoE",
    "glm4_moe": "Glm4MoeMoE",
    "gpt_oss": "GptOssMLP",
    "llama4_text": "Llama4TextMoe",
}
