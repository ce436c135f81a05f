# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a Qwen3-MoE whose experts are in four bits (NF4), with LoRA, compiled in one graph.

Run it: python examples/qlora.py
"""

import sys
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe_ops.integrations.transformers import MoeOpsConfig, register

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
register()

# A small checkpoint with random weights stands for yours.
config = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
)
checkpoint = tempfile.TemporaryDirectory()
plain = AutoModelForCausalLM.from_config(config, experts_implementation="moe_ops")
plain.save_pretrained(checkpoint.name)

# The experts are quantised while they are loaded. All else stays as it is.
base = AutoModelForCausalLM.from_pretrained(
    checkpoint.name,
    quantization_config=MoeOpsConfig("nf4"),
    experts_implementation="moe_ops",
    device_map=device,
)
experts = base.model.layers[0].mlp.experts
print(
    f"gate_up_proj {experts.gate_up_proj.nbytes / experts.gate_up_proj.shape.numel() * 8:.2f} bits"
)

# The adapters are those of the plain model: the same names and shapes.
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_parameters=targets))
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

# Adapters and quantised weights are saved apart, each as its library does it.
model.save_pretrained(f"{checkpoint.name}/adapters")
model.unload()
base.save_pretrained(f"{checkpoint.name}/nf4")
base = AutoModelForCausalLM.from_pretrained(
    f"{checkpoint.name}/nf4", experts_implementation="moe_ops", device_map=device
)
again = peft.PeftModel.from_pretrained(base, f"{checkpoint.name}/adapters")
with torch.no_grad():
    loaded = again(input_ids=tokens, labels=tokens).loss.item()
print(f"loaded again, loss {loaded:.3f}")
checkpoint.cleanup()
sys.exit(None if loaded < losses[-1] < 0.9 * losses[0] else "the loss did not fall by a tenth")
