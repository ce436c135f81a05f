# SPDX-License-Identifier: Apache-2.0
"""The benchmark of moe_ops' Triton kernels on a GPU: a module for each part, `python -m` for all."""
