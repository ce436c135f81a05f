# SPDX-License-Identifier: Apache-2.0
"""The judge of numbers: every op as plain loops in fp64, under the op's name.

Nothing of moe_ops is imported here, and nothing is fast: a reader should be able to hold each
function against the op's contract and see that they agree. Floating tensors are brought to fp64
first, with their autograd history, so `torch.autograd.grad` through a function of the oracle is
the reference for the op's gradients.

selection.py      topk_routing
routing.py        routing_indices, and random topk_ids
rows.py           permute and unpermute
gemm.py           grouped_gemm and its gradients
experts.py        fused_experts and its activations
quantized.py      quantised weights, bit by bit
expert_parallel.py  ep_dispatch and ep_combine, for all ranks at once
differentiate.py  gradients of the ops

A slot is t*K + k: choice k of token t. Expert order is the rows grouped by expert, in slot order
within an expert, dropped slots last.
"""

from testing.oracle.differentiate import gradients, to_fp64
from testing.oracle.expert_parallel import (
    ep_combine,
    ep_combine_backward,
    ep_dispatch,
    ep_dispatch_backward,
    filled_rows,
    local_ids,
    sent_slots,
    unspecified,
)
from testing.oracle.experts import (
    activated,
    activation_of,
    expert_layer,
    fused_experts,
    fused_experts_down_backward,
    fused_experts_forward,
    fused_experts_lora,
    fused_experts_lora_backward,
    fused_experts_lora_forward,
    fused_experts_up_backward,
)
from testing.oracle.gemm import (
    grouped_gemm,
    grouped_gemm_dw,
    grouped_gemm_dx,
)
from testing.oracle.quantized import dequantize_weight, plain_call, without_weight
from testing.oracle.routing import ROUTINGS, dropped_slots, random_topk_ids, routing_indices
from testing.oracle.rows import permute, unpermute, unpermute_backward
from testing.oracle.selection import (
    routing_weights,
    selection_gap,
    selection_keys,
    topk_routing,
    topk_routing_backward,
)

__all__ = [
    "ROUTINGS",
    "activated",
    "activation_of",
    "dequantize_weight",
    "dropped_slots",
    "ep_combine",
    "ep_combine_backward",
    "ep_dispatch",
    "ep_dispatch_backward",
    "expert_layer",
    "filled_rows",
    "fused_experts",
    "fused_experts_down_backward",
    "fused_experts_forward",
    "fused_experts_lora",
    "fused_experts_lora_backward",
    "fused_experts_lora_forward",
    "fused_experts_up_backward",
    "gradients",
    "grouped_gemm",
    "grouped_gemm_dw",
    "grouped_gemm_dx",
    "local_ids",
    "permute",
    "plain_call",
    "random_topk_ids",
    "routing_indices",
    "routing_weights",
    "selection_gap",
    "selection_keys",
    "sent_slots",
    "to_fp64",
    "topk_routing",
    "topk_routing_backward",
    "unpermute",
    "unpermute_backward",
    "unspecified",
    "without_weight",
]
