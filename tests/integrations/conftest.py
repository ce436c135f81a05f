# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os

import pytest

# Every model here is made from a config. A test that asks a hub for one must fail, not download.
os.environ["HF_HUB_OFFLINE"] = "1"


class WithoutTransformers(pytest.Module):
    def collect(self):
        pytest.skip("the transformers extra is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if importlib.util.find_spec("transformers") is None:
        return WithoutTransformers.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True, scope="session")
def registered():
    from moe_ops.integrations.transformers import register

    register()
