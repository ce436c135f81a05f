# SPDX-License-Identifier: Apache-2.0
"""Give every test here a cache of its own, and a fake GPU if it asks for one."""

import pytest

from moe_ops import tuning
from moe_ops.cli import tune as tune_command
from moe_ops.configs import cache
from testing.tuning_fakes import CPU, HOPPER, Clock


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(folder))
    monkeypatch.delenv("MOE_OPS_AUTOTUNE", raising=False)
    cache.forget()
    yield folder
    cache.forget()


@pytest.fixture
def fake_gpu(monkeypatch):
    """Make the CPU pass for a Hopper GPU, and return the clock."""
    clock = Clock()
    monkeypatch.setattr(tuning, "current_device", lambda: CPU)
    for module in (tuning, tune_command):
        monkeypatch.setattr(module, "device_of", lambda device: HOPPER)
    monkeypatch.setattr(tuning, "cuda_milliseconds", clock)
    return clock
