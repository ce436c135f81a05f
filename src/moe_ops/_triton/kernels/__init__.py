# SPDX-License-Identifier: Apache-2.0
"""Triton code that several ops share."""
