# SPDX-License-Identifier: Apache-2.0
import os

import pytest

# Every model here is made from a config; a test that asks a hub for one must fail, not download.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest.importorskip("transformers", reason="the transformers extra is not installed")


@pytest.fixture(autouse=True, scope="session")
def registered():
    from moe_ops.integrations.transformers import register

    register()
