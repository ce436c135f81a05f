# SPDX-License-Identifier: Apache-2.0
"""MoE layers that transformers' experts interface does not reach."""
