# SPDX-License-Identifier: Apache-2.0
"""Train a small Qwen3-MoE of transformers, compiled in one graph, with its experts on moe_ops.

Run it: python examples/transformers_model.py
"""

import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moe_ops.integrations.transformers

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=2,
)

# The two lines that matter. With a checkpoint it is from_pretrained(name, experts_implementation=...).
moe_ops.integrations.transformers.register()
model: nn.Module = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops")

compiled = torch.compile(model.to(device), fullgraph=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(config.vocab_size, (4, 32), device=device)  # it learns these by heart

losses = []
for step in range(10):
    loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step}  loss {losses[-1]:.3f}")
sys.exit(None if losses[-1] < losses[0] / 2 else "the loss did not fall to half")
