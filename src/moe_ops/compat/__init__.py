# SPDX-License-Identifier: Apache-2.0
"""Offers the functions of Unsloth's MoE kernels, under their names, on top of torch.ops.moe.*.

Code written for those kernels changes its imports and nothing else. New code should call the functions
of `moe_ops` itself.
"""

from moe_ops.compat.functional import grouped_gemm, torch_grouped_gemm
from moe_ops.compat.routing import calculate_topk, get_routing_indices, permute, unpermute

__all__ = [
    "calculate_topk",
    "get_routing_indices",
    "grouped_gemm",
    "permute",
    "torch_grouped_gemm",
    "unpermute",
]
