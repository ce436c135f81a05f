# SPDX-License-Identifier: Apache-2.0
"""The op schemas: one YAML file an op, installed as the package `moe_ops.op_schemas`."""
