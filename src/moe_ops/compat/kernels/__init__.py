# SPDX-License-Identifier: Apache-2.0
"""Holds `tuning`, under the import path that it has in Unsloth's MoE kernels."""
