# SPDX-License-Identifier: Apache-2.0
"""Register all ops, one folder each."""
