# SPDX-License-Identifier: Apache-2.0
"""Gives tests the processes of several ranks."""

import pytest
from torch import distributed

from testing.ranks import all_ranks


@pytest.fixture(scope="session")
def ranks():
    """Return a function from a world size to its Ranks."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    with all_ranks() as function:
        yield function
