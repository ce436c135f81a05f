# SPDX-License-Identifier: Apache-2.0
"""Skip the GPU tests where there is no GPU, and write a report if one is asked for."""

import os
import sys

import pytest
import torch

from testing import gpu_recorder as recorder


def pytest_configure(config):
    _turn_gpus()
    path = recorder.report_path()
    if path is None:
        return
    if not recorder.is_worker(config) and not torch.cuda.is_available():
        pytest.exit("make test-gpu needs a CUDA GPU, and torch sees none", returncode=1)
    config.pluginmanager.register(recorder.plugin(config, path), "moe_ops_gpu_report")


def _turn_gpus():
    """Give each of xdist's workers another GPU as its first, so that the tests share all of them.

    It is before anything in the process asks for a GPU.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        turn = int(worker) % len(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[turn:] + gpus[:turn])


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if (needed := _gpus_needed(item)) > gpus:
            reason = f"needs {needed} CUDA GPU{'s' * (needed > 1)}, torch sees {gpus}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _gpus_needed(item):
    if (several := item.get_closest_marker("multi_gpu")) is not None:
        return several.args[0] if several.args else 2
    return 1 if item.get_closest_marker("gpu") else 0


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
