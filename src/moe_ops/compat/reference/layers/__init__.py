# SPDX-License-Identifier: Apache-2.0
"""Holds a module per model: the torch block of Qwen3-MoE and the block of Llama 4."""
