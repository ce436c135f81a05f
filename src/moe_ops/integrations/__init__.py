# SPDX-License-Identifier: Apache-2.0
"""Adapters to other libraries, one module each; none is imported before the user asks for it."""
