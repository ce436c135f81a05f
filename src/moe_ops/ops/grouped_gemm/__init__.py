# SPDX-License-Identifier: Apache-2.0
"""The op grouped_gemm."""

from moe_ops.ops.grouped_gemm.op import grouped_gemm as grouped_gemm
