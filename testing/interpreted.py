# SPDX-License-Identifier: Apache-2.0
"""Marks the tests that run in Triton's interpreter."""

import os

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles for a GPU unless TRITON_INTERPRET=1 is set before its import",
)
