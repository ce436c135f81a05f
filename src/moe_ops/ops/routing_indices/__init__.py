# SPDX-License-Identifier: Apache-2.0
"""Export the op routing_indices."""

from moe_ops.ops.routing_indices.op import routing_indices as routing_indices
