# SPDX-License-Identifier: Apache-2.0
"""Train LoRA adapters on the experts of a transformers model through PEFT, compiled in one graph.

Run it: python examples/lora.py
"""

import sys

import peft
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moe_ops.integrations.peft
import moe_ops.integrations.transformers

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# A small model with random weights stands for your checkpoint.
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
moe_ops.integrations.transformers.register()
base = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops").to(device)

# The two lines that matter. Without enable, PEFT adds the adapters to the weights in each forward.
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_parameters=experts))
moe_ops.integrations.peft.enable(model)

model.print_trainable_parameters()
compiled = torch.compile(model, fullgraph=True)
adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(adapters, lr=2e-2)
tokens = torch.randint(config.vocab_size, (4, 32), device=device)

losses = []
for step in range(10):
    loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step}  loss {losses[-1]:.3f}")
sys.exit(None if losses[-1] < 0.9 * losses[0] else "the loss did not fall by a tenth")
