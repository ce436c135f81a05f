# SPDX-License-Identifier: Apache-2.0
"""The ops, one folder each; importing this registers all of them."""
