# SPDX-License-Identifier: Apache-2.0
"""Choose the model's sizes, compute its losses, and evaluate and sample it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_ops.layers import load_balance_metrics
from training.settings import Settings
from training.text import VOCAB_SIZE

HEAD_DIM = 32
PROMPT = b'def read_config(path):\n    """'


def make_config(settings: Settings) -> Qwen3MoeConfig:
    """Make the configuration of a Qwen3-MoE for bytes, of the sizes in the settings."""
    num_heads = settings.hidden_size // HEAD_DIM
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        moe_intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=settings.context,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
    )


def forward(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predict each byte of the windows from those before it. This function is compiled.

    Returns:
        cross_entropy (scalar): nats per byte.
        balance_loss (scalar): what load_balancing_loss returns.
        expert_loads (num_layers, num_experts): tokens that went to each expert.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        outputs = model(input_ids=tokens, output_router_logits=True, use_cache=False)
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    cross_entropy = F.cross_entropy(logits, tokens[:, 1:].flatten())
    router_probs = torch.stack(outputs.router_logits).float().softmax(-1)
    topk_ids = router_probs.topk(model.config.num_experts_per_tok).indices
    expert_loads = F.one_hot(topk_ids, model.config.num_experts).sum((1, 2))
    return cross_entropy, load_balancing_loss(router_probs, expert_loads), expert_loads


def load_balancing_loss(router_probs: Tensor, expert_loads: Tensor) -> Tensor:
    """Average the Switch Transformer's auxiliary loss over the layers; 1.0 if loads are even.

    transformers has another one, which adds up the layers' loads first. An expert that is busy in
    one layer then makes up for one that is idle in another.
    """
    shares = expert_loads / expert_loads.sum(-1, keepdim=True)
    return router_probs.shape[-1] * (shares * router_probs.mean(1)).sum(-1).mean()


def imbalances(expert_loads: Tensor) -> list[float]:
    """Divide the load of each layer's busiest expert by the mean load. 1.0 is perfect."""
    values: list[float] = load_balance_metrics(expert_loads)["max_over_mean"].tolist()
    return values


def imbalance(expert_loads: Tensor) -> float:
    """Average the imbalances over the layers."""
    return statistics.fmean(imbalances(expert_loads))


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, batches: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Return the loss in nats per byte, and the loads. A second compiled graph would not pay."""
    losses, loads, weights = [], [], []
    for tokens in batches:
        cross_entropy, _, expert_loads = forward(model, tokens)
        losses.append(cross_entropy.item())
        loads.append(expert_loads)
        weights.append(len(tokens))
    loss = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return loss, torch.stack(loads).sum(0)


def sample(model: Qwen3MoeForCausalLM, settings: Settings) -> str:
    """Return PROMPT and what the model writes after it, as much as fits into one window."""
    torch.manual_seed(settings.seed)
    prompt = torch.tensor([list(PROMPT[: settings.context // 2])], device=settings.device)
    with torch.autocast(prompt.device.type, torch.bfloat16, enabled=prompt.is_cuda):
        output = model.generate(  # type: ignore[misc]
            prompt, do_sample=True, temperature=0.7, max_length=settings.context, pad_token_id=0
        )
    return bytes(output[0].tolist()).decode(errors="replace")
