# SPDX-License-Identifier: Apache-2.0
"""A GPU with tensor descriptors, for launchers whose kernels are interpreted."""

import pytest

from moe_ops.configs.device import Device

HOPPER = Device("H", (9, 0), 232448, 4)


@pytest.fixture
def descriptors(monkeypatch):
    """The launchers take the CPU for a Hopper GPU; lists the descriptors made: kind, dimensions.

    But not hopper.py, whose kernels Triton's interpreter does not take.
    """
    gemm = pytest.importorskip("moe_ops._triton.gemm")
    descriptors = pytest.importorskip("moe_ops._triton.descriptors")
    made: list[tuple[str, int]] = []
    describe = descriptors.describe

    def describe_and_list(tensor, block, ragged=False):
        descriptor = describe(tensor, block, ragged)
        if descriptor is not None:
            made.append(("ragged" if ragged else "plain", len(block)))
        return descriptor

    monkeypatch.setattr(gemm, "describe", describe_and_list)
    for module in (gemm, descriptors):
        monkeypatch.setattr(module, "device_of", lambda device: HOPPER)
    return made
