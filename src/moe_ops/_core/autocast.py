# SPDX-License-Identifier: Apache-2.0
"""Whether autocast casts a tensor, for modules that would otherwise cast or refuse it themselves."""

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Tell whether autocast is on for the tensor's device. The meta device has none."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
