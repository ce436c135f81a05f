# SPDX-License-Identifier: Apache-2.0
"""Export the op permute."""

from moe_ops.ops.permute.op import permute as permute
