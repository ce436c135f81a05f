# SPDX-License-Identifier: Apache-2.0
"""Records how large the floating tensors are that ops make."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestFloats(TorchDispatchMode):
    """Records the elements of the largest floating tensor that an op returns, but for a model's own."""

    def __init__(self, model=None):
        super().__init__()
        parameters = model.parameters() if model is not None else ()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            is_new = tensor.untyped_storage().data_ptr() not in self.known
            if is_new and tensor.is_floating_point() and tensor.itemsize > 1:
                self.largest = max(self.largest, tensor.numel())
        return out
