# SPDX-License-Identifier: Apache-2.0
"""MoE blocks of transformers models whose every stage can be looked at."""
