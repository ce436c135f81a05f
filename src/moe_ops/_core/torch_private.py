# SPDX-License-Identifier: Apache-2.0
"""Collects the private torch names that the core uses, each with the reason why.

torch's own custom ops use all but the last three (torch/_library/autograd.py).
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# What torch's kernels set before they call what stands below autograd. torch.no_grad() is not the
# same: it still visits the Autograd kernels and tracks views.
below_autograd = torch._C._AutoDispatchBelowAutograd
# `OpOverload.redispatch` takes a set of dispatch keys. Only torch knows which stand below Autograd.
AFTER_AUTOGRAD = torch._C._after_autograd_keyset
# The same question in Python adds 1 us to a call of 5 us.
any_requires_grad = torch._C._any_requires_grad
# The public torch._check raises RuntimeError. Ours are ValueErrors, in compiled code too.
check_with = torch._check_with


def forward_ad_is_on() -> bool:
    """Tell whether somebody is inside forward_ad.dual_level() or torch.func.jvp.

    Asking each tensor for its tangent, which is public, costs every call as much as a kernel's checks.
    """
    return forward_ad._current_level >= 0


def is_in_backward() -> bool:
    """Tell whether autograd is at work, as it is where a checkpoint computes a forward again.

    torch's own checkpoint asks in the same way.
    """
    return torch._C._current_graph_task_id() != -1
