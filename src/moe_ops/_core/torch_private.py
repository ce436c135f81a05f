# SPDX-License-Identifier: Apache-2.0
"""Collects the private torch names that the core uses, each with the reason why.

torch's own custom ops use the first three (torch/_library/autograd.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
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


def process_group(name: str) -> Any:
    """Return the process group of this name, or raise torch's RuntimeError.

    torch's own functional collectives find a group by its name in this way.
    """
    from torch.distributed import distributed_c10d

    # Newer torch has a type of its own for names.
    return cast(Any, distributed_c10d)._resolve_process_group(name)


def group_timeout(group: Any, device: torch.device) -> timedelta:
    """Return the time limit of a process group's collectives on a device.

    torch tells it only to those who make the group. Where a backend has no options, torch's default
    holds.
    """
    from torch.distributed.constants import default_pg_timeout

    options = getattr(group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", default_pg_timeout)
    return timeout


def all_to_all(rows: Tensor, world_size: int, group: str) -> Tensor:
    """Send the r-th of world_size equal parts of rows to rank r; return what came, by rank.

    torch's functional collectives have no public name, and the public all_to_all_single takes a group
    and a tensor for its output.
    """
    functional = torch.ops._c10d_functional
    parts = [rows.shape[0] // world_size] * world_size
    came: Tensor = functional.wait_tensor(functional.all_to_all_single(rows, parts, parts, group))
    return came


def has_symmetric_memory() -> bool:
    """Tell whether this torch has symmetric memory."""
    try:
        symmetric_memory()
    except ImportError:
        return False
    return True


def symmetric_memory() -> Any:
    """Return torch's module of symmetric memory, which has no public name yet."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory
