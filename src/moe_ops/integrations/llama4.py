# SPDX-License-Identifier: Apache-2.0
"""Run the MoE layers of transformers' Llama 4 on moe::fused_experts.

Llama 4's experts do not go through transformers' experts interface, so experts_implementation does
not reach them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import fused_experts
from moe_ops.integrations.transformers import activation_name, in_dtype_for

__all__ = ["replace_llama4_moe_"]

_FUNCTION = "moe_ops.integrations.llama4.replace_llama4_moe_"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def replace_llama4_moe_(model: nn.Module) -> list[str]:
    """Give the MoE layers of a Llama 4 model a forward that computes the chosen experts alone.

        router_scores, router_logits = router(x)
        output = shared_expert(x) + sum over the top_k experts e of
                 down_proj[e](act(gate) * up),  gate, up = halves of gate_up_proj[e](router_scores[e] * x)

    transformers' own forward computes every expert for every token, all but top_k of them with a
    score of zero. The model keeps its modules, parameters and their names, so that loading, saving,
    optimisers and hooks on router, shared expert and layer stay as they are. Hooks that are put on
    `experts` later do not run. Call it after the model has its weights and before torch.compile;
    calling it again changes nothing.

    Differentiable as before. The same inputs give the same bits.

    Args:
        model: Llama4ForCausalLM, Llama4ForConditionalGeneration, or any module that holds
            Llama4TextMoe layers. It is changed in place.

    Returns:
        names: of the layers that now run on moe::fused_experts.

    Raises:
        ValueError: the model has no such layer, or one of them cannot be computed here: its experts
            have hooks (accelerate's offloading, tensor parallelism), are quantised or have an
            activation that fused_experts does not know, or its forward is another library's.
            Nothing is changed then.
        ImportError: transformers is missing or has no Llama 4.

    Source: Llama4TextMoe, transformers/models/llama4/modeling_llama4.py.
    """
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    # A subclass with a forward of its own, as moe_ops.compat has one, stays what it is.
    own = Llama4TextMoe.forward
    blocks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Llama4TextMoe) and type(module).forward is own
    }
    if not blocks:
        raise ValueError(
            f"{_FUNCTION}: expected a model with Llama4TextMoe layers, got {type(model).__name__} "
            "without; other models take experts_implementation='moe_ops'"
        )
    for name, block in blocks.items():
        if (reason := _obstacle(block)) is not None:
            raise ValueError(
                f"{_FUNCTION}: expected layers as transformers makes them: {name} {reason}"
            )
    for block in blocks.values():
        # Not a method, which would be copied and pickled as the class's own forward.
        block.__dict__["forward"] = functools.partial(llama4_moe_forward, block)
    return list(blocks)


def llama4_moe_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a Llama4TextMoe.

    Args:
        self: the layer.
        hidden_states ((..., hidden_size), floating): the tokens.

    Returns:
        output ((num_tokens, hidden_size), the dtype of the shared expert's output).
        router_logits ((num_tokens, num_experts), floating): as transformers' own.

    Differentiable, both, in hidden_states and every parameter. Deterministic.
    """
    tokens = hidden_states.reshape(-1, self.hidden_dim)
    router_scores, router_logits = self.router(tokens)
    # The router keeps its choice to itself. The same topk of the same logits chooses the same.
    topk_ids = torch.topk(router_logits, self.top_k, dim=1).indices
    experts = self.experts
    routed = fused_experts(
        in_dtype_for(experts.gate_up_proj, tokens),
        experts.gate_up_proj.transpose(1, 2),
        experts.down_proj.transpose(1, 2),
        topk_ids,
        router_scores.gather(1, topk_ids),
        activation=activation_name(experts.act_fn),
        weights_before=True,
    )
    return self.shared_expert(tokens) + routed, router_logits


def _obstacle(block: Any) -> str | None:
    """Say why this layer cannot be computed here; None where it can."""
    forward = block.__dict__.get("forward")
    if forward is not None and getattr(forward, "func", None) is not llama4_moe_forward:
        return "has a forward of its own"
    experts = block.experts
    if experts._forward_hooks or experts._forward_pre_hooks or "forward" in experts.__dict__:
        return "has hooks on its experts"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name, None)
        if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            dtype = getattr(weight, "dtype", None)
            return f"has {name} as {type(weight).__name__} of {dtype}"
    if activation_name(experts.act_fn) is None:
        return f"has an activation that is unknown here, {type(experts.act_fn).__name__}"
    return None
