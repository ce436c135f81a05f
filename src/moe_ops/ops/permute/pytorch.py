# SPDX-License-Identifier: Apache-2.0
"""permute in PyTorch."""

from __future__ import annotations

import torch

from moe_ops._pytorch.rows import tokens_of_rows


def permute(
    input: torch.Tensor,
    gather_indices: torch.Tensor,
    top_k: int,
    scatter_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    return input.index_select(0, tokens_of_rows(gather_indices, top_k))
