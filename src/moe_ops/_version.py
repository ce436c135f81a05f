# SPDX-License-Identifier: Apache-2.0
"""The version of the package; setup.py reads it without importing anything."""

__version__ = "0.1.0.dev0"
