# SPDX-License-Identifier: Apache-2.0
"""Export the op unpermute."""

from moe_ops.ops.unpermute.op import unpermute as unpermute
