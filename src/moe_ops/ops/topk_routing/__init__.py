# SPDX-License-Identifier: Apache-2.0
"""Export the op topk_routing."""

from moe_ops.ops.topk_routing.op import topk_routing as topk_routing
