# SPDX-License-Identifier: Apache-2.0
"""Export the op ep_combine."""

from moe_ops.ops.ep_combine.op import ep_combine as ep_combine
