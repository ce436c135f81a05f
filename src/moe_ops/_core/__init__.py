# SPDX-License-Identifier: Apache-2.0
"""From op schemas to registered ops; nothing here knows a particular op."""
