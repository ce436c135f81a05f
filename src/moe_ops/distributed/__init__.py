# SPDX-License-Identifier: Apache-2.0
"""Spread the experts of a model over the ranks of a torch.distributed process group.

docs/scaling.md says how it works, what it keeps in memory, and how to choose the mesh.
"""

from moe_ops.distributed.api import dropped_slots, expert_parallel
from moe_ops.distributed.clip import clip_grad_norm_
from moe_ops.distributed.style import ExpertParallel

__all__ = ["ExpertParallel", "clip_grad_norm_", "dropped_slots", "expert_parallel"]
