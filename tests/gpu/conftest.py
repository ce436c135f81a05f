# SPDX-License-Identifier: Apache-2.0
"""Skip the GPU tests where there is no GPU, and write a report if one is asked for."""

import os
import sys

import pytest
import torch

from testing import gpu_recorder as recorder


def pytest_configure(config):
    path = recorder.report_path()
    if path is None:
        return
    if not recorder.is_worker(config) and not torch.cuda.is_available():
        pytest.exit("make test-gpu needs a CUDA GPU, and torch sees none", returncode=1)
    config.pluginmanager.register(recorder.plugin(config, path), "moe_ops_gpu_report")


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none"))
        elif item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, torch sees {gpus}"))


@pytest.fixture(autouse=True)
def _device_stays_sound(request):
    """End the worker after an illegal access, since its process cannot use the GPU any more.

    xdist then starts another worker and reports the test that did it.
    """
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        sys.stderr.write(f"{request.node.nodeid}: {error}\n")
        sys.stderr.flush()
        os._exit(3)
