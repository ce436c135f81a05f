# SPDX-License-Identifier: Apache-2.0
"""Export the op grouped_gemm."""

from moe_ops.ops.grouped_gemm.op import grouped_gemm as grouped_gemm
