# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts ops for PyTorch, registered through torch.library.

Importing this package registers torch.ops.moe.*; the functions here are the same ops, typed and
documented.
"""

from typing import TYPE_CHECKING, Any

from moe_ops import _distribution
from moe_ops._version import __version__ as __version__
from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from moe_ops.fp8 import dequantize_fp8, quantize_fp8
from moe_ops.ops import dequantize_weight as _dequantize_weight  # noqa: F401 - registers the op
from moe_ops.ops import fused_experts_lora as _fused_experts_lora  # noqa: F401 - registers the ops
from moe_ops.ops.ep_combine import ep_combine
from moe_ops.ops.ep_dispatch import ep_dispatch
from moe_ops.ops.fused_experts import fused_experts
from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.ops.permute import permute
from moe_ops.ops.routing_indices import routing_indices
from moe_ops.ops.topk_routing import topk_routing
from moe_ops.ops.unpermute import unpermute
from moe_ops.quantization import QuantizedWeight, quantize_weight

if TYPE_CHECKING:
    from moe_ops.tuning import tune

__all__ = [
    "KernelConfigBackward_dW",
    "KernelConfigBackward_dX",
    "KernelConfigForward",
    "QuantizedWeight",
    "dequantize_fp8",
    "ep_combine",
    "ep_dispatch",
    "fused_experts",
    "grouped_gemm",
    "kernel_config",
    "permute",
    "quantize_fp8",
    "quantize_weight",
    "routing_indices",
    "topk_routing",
    "tune",
    "unpermute",
]

_distribution.warn_of_the_other()


def __getattr__(name: str) -> Any:
    # Imported when asked for: most programs never tune.
    if name == "tune":
        from moe_ops.tuning import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
