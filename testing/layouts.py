# SPDX-License-Identifier: Apache-2.0
"""Lays values out in memory in the ways that ops must take."""

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
INDEX_LAYOUTS = ("contiguous", "sliced")


def lay_out(content: Tensor, layout: str) -> Tensor:
    """Return the same values in other strides (`expanded` repeats the first slice of one dimension).

    What lies between the elements of a sliced tensor is NaN, or an index far out of range.
    """
    if layout == "transposed" and content.dim() >= 2:
        return content.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "sliced":
        filler = float("nan") if content.is_floating_point() else 2**30
        filler = 255 if content.dtype == torch.uint8 else filler
        buffer = content.new_full([2 * size + 1 for size in content.shape], filler)
        view = buffer[tuple(slice(1, 2 * size + 1, 2) for size in content.shape)]
        return view.copy_(content)
    if layout == "expanded":
        # The last dimension of a matrix, the first of anything larger: those that kernels walk.
        dim = -1 if content.dim() <= 2 else 0
        if content.shape[dim] > 0:
            return content.narrow(dim, 0, 1).clone().expand(content.shape)
    return content.contiguous()
