# SPDX-License-Identifier: Apache-2.0
"""Export the op grouped_gemm_fp8."""

from moe_ops.ops.grouped_gemm_fp8.op import grouped_gemm_fp8 as grouped_gemm_fp8
