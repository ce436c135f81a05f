# SPDX-License-Identifier: Apache-2.0
"""Give every test its hypothesis profile, a seed, and no stale compile caches."""

import os
import sys

# AOTAutograd's cache on disk does not see a changed backward formula. This is set before torch is
# imported, and the tests' subprocesses inherit it.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from torch import distributed

from testing.ranks import all_ranks

pytest.register_assert_rewrite("testing.checks")

_SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large]
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    print_blob=True,
    suppress_health_check=_SLOW_TO_DRAW,
)
hypothesis.settings.register_profile(
    "nightly",
    deadline=None,
    derandomize=False,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=_SLOW_TO_DRAW,
)
hypothesis.settings.load_profile(os.environ.get("MOE_OPS_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded():
    """Seed each test, so it draws the same numbers alone, in any order, and in any worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Forget compiled code, so no test meets another one's code or recompilation limits."""
    yield
    # Importing Dynamo takes two seconds. If nothing imported it, there is nothing to forget.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def ranks():
    """Return a function from a world size to its Ranks."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    with all_ranks() as function:
        yield function
