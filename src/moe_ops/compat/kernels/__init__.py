# SPDX-License-Identifier: Apache-2.0
"""Holds `tuning`, so that its import path is that of Unsloth's MoE kernels."""
