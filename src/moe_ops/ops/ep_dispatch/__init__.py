# SPDX-License-Identifier: Apache-2.0
"""Export the op ep_dispatch."""

from moe_ops.ops.ep_dispatch.op import ep_dispatch as ep_dispatch
