# SPDX-License-Identifier: Apache-2.0
"""The kernel configurations, where code written for Unsloth's kernels imports them from."""

from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)

__all__ = ["KernelConfigBackward_dW", "KernelConfigBackward_dX", "KernelConfigForward"]
