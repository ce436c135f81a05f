# SPDX-License-Identifier: Apache-2.0
"""Builds small models of transformers' own classes from configs, and runs one step of them."""

import copy
from dataclasses import dataclass

import torch
import transformers

NUM_EXPERTS, TOP_K = 4, 2
VOCAB_SIZE, BATCH, LENGTH = 48, 2, 12

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}


@dataclass(frozen=True)
class TinyModel:
    model_class: str
    config_class: str
    options: dict[str, object]


MODELS = {
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": NUM_EXPERTS,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_vl_moe_text": TinyModel(
        "Qwen3VLMoeTextModel",
        "Qwen3VLMoeTextConfig",
        {
            "num_experts": NUM_EXPERTS,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
    ),
    "mixtral": TinyModel(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": NUM_EXPERTS, "intermediate_size": 24},
    ),
    "gpt_oss": TinyModel(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "num_local_experts": NUM_EXPERTS,
            "intermediate_size": 24,
            "head_dim": 16,
            "layer_types": ["full_attention"],
        },
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DEEPSEEK,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "glm4_moe": TinyModel("Glm4MoeForCausalLM", "Glm4MoeConfig", {**DEEPSEEK, "head_dim": 16}),
    "olmoe": TinyModel(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"num_experts": NUM_EXPERTS, "intermediate_size": 24, "num_key_value_heads": 4},
    ),
    "nemotron_h": TinyModel(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "intermediate_size": 40,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def make_model(name, dtype=torch.float32):
    """Return the model in training mode, with weights so wide that every expert shows in its output.

    `name` is one of MODELS, or a TinyModel.
    """
    tiny = name if isinstance(name, TinyModel) else MODELS[name]
    options = {**COMMON, "num_hidden_layers": 1, **tiny.options}
    torch.manual_seed(0)
    config = getattr(transformers, tiny.config_class)(**options)
    model = getattr(transformers, tiny.model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def find_experts(model):
    """Return the modules that transformers dispatches through its experts interface."""
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def routings(model, input_ids):
    """Return the experts of each token in each experts module, as sorted ids."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1].sort(-1).values))
        for module in find_experts(model)
    ]
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def draw_batch(model, generator):
    """Draw token ids that the model routes alike in its own dtype and in fp32.

    Where two experts of a token score within a rounding of each other, eager and compiled code may
    pick different ones, and both are right. Such batches are drawn again.
    """
    precise = copy.deepcopy(model).float()
    for _ in range(100):
        input_ids = torch.randint(3, VOCAB_SIZE, (BATCH, LENGTH), generator=generator)
        if torch.equal(routings(model, input_ids), routings(precise, input_ids)):
            return input_ids
    raise RuntimeError("no batch without a near tie in 100 draws")


def run_step(model, input_ids):
    """Return output and gradients by parameter name, for one fixed tangent."""
    model.zero_grad()
    output = model(input_ids=input_ids, use_cache=False)[0]
    tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.float() * tangent).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), gradients
