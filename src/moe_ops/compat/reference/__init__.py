# SPDX-License-Identifier: Apache-2.0
"""Holds the MoE blocks of transformers models, with every stage of a forward to look at."""
