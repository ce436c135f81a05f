# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts ops for PyTorch, registered through torch.library.

Importing this package registers torch.ops.moe.*; the functions here are the same ops, typed and
documented.
"""

from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.ops.permute import permute
from moe_ops.ops.routing_indices import routing_indices
from moe_ops.ops.topk_routing import topk_routing
from moe_ops.ops.unpermute import unpermute

__all__ = ["grouped_gemm", "permute", "routing_indices", "topk_routing", "unpermute"]
__version__ = "0.1.0.dev0"
